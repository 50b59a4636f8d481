from __future__ import annotations

import json

import pytest
from support import outcome

from gigabatch.launcher.bench.objectives import benchmark_cases
from gigabatch.launcher.cli.objectives import describe
from gigabatch.trainer.objectives import OBJECTIVES


def test_each_objective_is_explained_from_the_code() -> None:
    for name in OBJECTIVES:
        told = describe(name)
        assert all(told[part] for part in ("title", "papers", "formula", "passes", "use"))
        assert told["needs"]["taps"]
        untold = [key for key, value in told["keys"].items() if not value["help"]]
        assert not untold, (name, untold)


def test_the_command_lists_explains_and_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> tuple[int, str, str]:
        return outcome(monkeypatch, capsys, "objectives", *arguments)

    code, listed, _ = told()
    assert code == 0
    named = [line.split()[0] for line in listed.splitlines()[: len(OBJECTIVES)]]
    assert named == list(OBJECTIVES)
    _, explained, _ = told("queue")
    assert "MoCo" in explained
    assert "momentum: 0.999" in explained
    assert json.loads(told("sogclr", "--json")[1])["needs"]["tables"] == {"state": 2}
    code, _, error = told("no-such")
    assert code == 2
    assert "there is no objective 'no-such'" in error


def test_steps_are_timed_by_the_passes_that_objectives_declare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> tuple[int, str, str]:
        small = ("--size", "64", "--width", "8", "--rounds", "1")
        return outcome(monkeypatch, capsys, "bench", "objectives", *small, *arguments)

    found = json.loads(told("--json")[1])
    each = {one["objective"]: one for one in found["objectives"]}
    assert list(each) == list(benchmark_cases())
    assert {one["settings"]["name"] for one in each.values()} == set(OBJECTIVES) - {"sum"}
    assert each["siglip"]["passes"] == 3
    assert each["label_distance, mixtures"]["passes"] == 7 / 4 * each["label_distance"]["passes"]
    assert each["late_interaction"]["passes"] == 3 * 2 * 16 * 16
    for one in each.values():
        fair = one["passes"] * one["samples"] ** 2 / (4 * 64**2)
        plain = one["seconds"] / one["infonce_seconds"] / fair
        assert one["quotient"] == pytest.approx(plain)
        assert one["processor_quotient"] > 0
    code, said, _ = told("--only", "swav", "--only", "barlow")
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()] == [
        "objective",
        "barlow",
        "swav",
        "swav,",
    ]
    code, _, error = told("--only", "no-such")
    assert code == 2
    assert "unknown objective no-such; choose from barlow, " in error
