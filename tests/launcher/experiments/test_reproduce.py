"""`gigabatch reproduce`: real runs of a small experiment, stopped, gone on with, and told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import outcome

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.experiments import report
from gigabatch.launcher.experiments.run import Stopped, run_study
from gigabatch.launcher.experiments.studies.blocks import pair_of_vectors, pairs_of_views
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study
from gigabatch.trainer.run.folder import RunFolder


def _objective(name: str) -> dict[str, Any]:
    return {"objective": {"name": name, "taps": ["one", "two"]}}


SMALL = Study(
    name="small",
    papers=(34,),
    claim="Training helps.",
    setting="Pairs.",
    write=pairs_of_views(("one.npy", "two.npy"), latent=4, size=8, train=128, test=40),
    config={
        **pair_of_vectors("one", "one.npy", "two", "two.npy", size=8, width=16),
        "batch": {"global_size": 32, "micro_size": 32},
        "train.steps": 30,
        "optimizer": {"lr": 1e-2},
    },
    arms=(Arm("first", _objective("infonce")), Arm("more", _objective("siglip"), "", "first")),
    measures=(Measure("R@1", "retrieval", "test", "one2two_recall@1"),),
    bars=(Bar("R@1", lambda mean: mean("first", "R@1"), 0.1),),
)


def never() -> bool:
    return False


@pytest.mark.slow
def test_a_stopped_experiment_goes_on_and_tells_what_its_runs_left(tmp_path: Path) -> None:
    said: list[str] = []
    asked = iter(range(1000))
    with pytest.raises(Stopped):
        run_study(SMALL, 1, tmp_path, said.append, lambda: next(asked) > 12)
    half = RunFolder(tmp_path / "runs" / "small-first-0")
    (saved,) = half.steps_saved()
    assert 0 < saved < 30
    outcome = run_study(SMALL, 2, tmp_path, said.append, never)
    assert half.is_finished()
    assert len(said) == 4
    assert outcome.figures["first"]["R@1"].mean > 0.1
    kept = half.path / "eval" / "test-retrieval-step-00000030.json"
    value = json.loads(kept.read_text())["eval/test/one2two_recall@1"]
    assert outcome.figures["first"]["R@1"].values[0] == value
    more = RunFolder(tmp_path / "runs" / "small-more-1").config()
    assert str(more.train.init_from).startswith(str(tmp_path / "runs" / "small-first-1"))

    kept.write_text(json.dumps({"eval/test/one2two_recall@1": 0.0}))
    again = run_study(SMALL, 2, tmp_path, said.append, never)
    assert len(said) == 4  # nothing was trained
    assert again.figures["first"]["R@1"].values[0] == 0.0  # what the file says
    with pytest.raises(GigabatchError, match=r"another version of this experiment \(train.steps"):
        run_study(replace(SMALL, config={**SMALL.config, "train.steps": 31}), 1, tmp_path,
                  said.append, never)  # fmt: skip

    found = report.as_json(outcome)
    assert json.loads(json.dumps(found)) == found
    assert (found["paper"], found["claim"], found["holds"]) == (34, "Training helps.", True)
    assert report.keep(tmp_path, SMALL, found) == found
    read_again = {**found, "seconds": 0.1, "date": "2000-01-01"}
    assert report.keep(tmp_path, SMALL, read_again) == found  # what it cost to find
    words = {"setting": "told in other words"}
    assert report.keep(tmp_path, SMALL, read_again | words) == found | words
    assert json.loads(report.kept(tmp_path, SMALL).read_text()) == found | words
    other = {**read_again, "figures": {}}
    assert report.keep(tmp_path / "other", SMALL, other) == other
    report.write_report(tmp_path / "docs" / "found.md", tmp_path, [SMALL])
    text = (tmp_path / "docs" / "found.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 55
    assert sum("[holds](#small)" in row for row in rows) == 1
    assert "first  " in text


def test_experiments_are_listed_and_papers_without_one_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> tuple[int, str, str]:
        return outcome(monkeypatch, capsys, "reproduce", *arguments)

    code, listed, _ = told()
    assert code == 0
    assert "  symile " in listed
    found = json.loads(told("12", "--json")[1])
    assert (found["paper"], found["holds"], found["verdict"]) == (12, None, "not yet offered")
    assert "outside the purpose" in told("4")[1]
    code, _, error = told("34", "--out", "/proc/nowhere")
    assert (code, "--out /proc/nowhere cannot" in error) == (2, True)
    code, _, error = told("56")
    assert (code, "there is no experiment '56'" in error) == (2, True)
