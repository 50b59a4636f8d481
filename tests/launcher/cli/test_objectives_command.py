"""`gigabatch objectives` and `gigabatch bench objectives`."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from support import outcome

from gigabatch.launcher.bench.objectives import benchmark_cases
from gigabatch.launcher.cli.objectives import describe
from gigabatch.trainer.objectives import OBJECTIVES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: outcome(monkeypatch, capsys, *arguments)


def test_every_objective_and_each_of_its_keys_is_described() -> None:
    for name in OBJECTIVES:
        card = describe(name)
        assert all(card[part] for part in ("title", "papers", "formula", "passes", "use"))
        assert card["needs"]["taps"]
        unexplained = [key for key, entry in card["keys"].items() if not entry["help"]]
        assert not unexplained, (name, unexplained)


def test_objectives_are_listed_in_order(run: Run) -> None:
    code, out, _ = run("objectives")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[: len(OBJECTIVES)]] == list(OBJECTIVES)


def test_one_objective_is_explained_as_text_or_json(run: Run) -> None:
    _, out, _ = run("objectives", "queue")
    assert "MoCo" in out
    assert "momentum: 0.999" in out
    assert json.loads(run("objectives", "sogclr", "--json")[1])["needs"]["tables"] == {"state": 2}


def test_user_objective_is_explained(run: Run) -> None:
    code, out, _ = run("objectives", "module")
    assert (code, "package.mod:Class" in out) == (0, True)
    assert list(json.loads(run("objectives", "module", "--json")[1])["keys"]) == ["module", "args"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("infonse", "there is no objective 'infonse'. Did you mean infonce ("),
        ("late-interaction", "Did you mean late_interaction ("),
        ("clip", "Did you mean infonce ("),
        ("simclr", "Did you mean supcon ("),
        ("no-such", f"Choose one of {', '.join(OBJECTIVES)}"),
    ],
)
def test_unknown_objective_suggests_a_name(name: str, message: str, run: Run) -> None:
    code, _, err = run("objectives", name)
    assert (code, message in err) == (2, True), err


def test_bench_divides_time_by_the_declared_matrix_passes(run: Run) -> None:
    small = ("bench", "objectives", "--size", "64", "--width", "8", "--rounds", "1")
    results = json.loads(run(*small, "--json")[1])
    by_name = {result["objective"]: result for result in results["objectives"]}
    assert list(by_name) == list(benchmark_cases())
    assert {result["settings"]["name"] for result in by_name.values()} == set(OBJECTIVES) - {"sum"}
    assert by_name["siglip"]["passes"] == 3
    mixtures = by_name["label_distance, mixtures"]["passes"]
    assert mixtures == 7 / 4 * by_name["label_distance"]["passes"]
    assert by_name["late_interaction"]["passes"] == 3 * 2 * 16 * 16
    for result in by_name.values():
        declared = result["passes"] * result["samples"] ** 2 / (4 * 64**2)
        expected = result["seconds"] / result["infonce_seconds"] / declared
        assert result["quotient"] == pytest.approx(expected)
        assert result["processor_quotient"] > 0
    code, out, _ = run(*small, "--only", "swav", "--only", "barlow")
    assert code == 0
    first_words = [line.split()[0] for line in out.splitlines()]
    assert first_words == ["objective", "barlow", "swav", "swav,"]
    code, _, err = run(*small, "--only", "no-such")
    assert code == 2
    assert "unknown objective no-such; choose from barlow, " in err
