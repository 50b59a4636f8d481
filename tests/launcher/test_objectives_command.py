from __future__ import annotations

import json
from typing import Any

from gigabatch.launcher.cli_objectives import describe
from gigabatch.trainer.objectives import OBJECTIVES


def test_each_objective_is_explained_from_the_code() -> None:
    for name in OBJECTIVES:
        told = describe(name)
        assert all(told[part] for part in ("title", "papers", "formula", "passes", "use"))
        assert told["needs"]["taps"]
        untold = [key for key, value in told["keys"].items() if not value["help"]]
        assert not untold, (name, untold)


def test_the_command_lists_explains_and_refuses(gigabatch: Any) -> None:
    listed = gigabatch("objectives")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()[: len(OBJECTIVES)]] == list(
        OBJECTIVES
    )
    explained = gigabatch("objectives", "queue")
    assert "MoCo" in explained.stdout
    assert "momentum: 0.999" in explained.stdout
    one = json.loads(gigabatch("objectives", "sogclr", "--json").stdout)
    assert one["needs"]["tables"] == {"state": 2}
    wrong = gigabatch("objectives", "no-such")
    assert wrong.returncode == 2
    assert "there is no objective 'no-such'" in wrong.stderr
