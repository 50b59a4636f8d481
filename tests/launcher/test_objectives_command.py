from __future__ import annotations

import json

import pytest
from support import outcome

from gigabatch.launcher.cli_objectives import describe
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
