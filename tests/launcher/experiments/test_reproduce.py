"""`gigabatch reproduce`: runs of a small study, resumed after a stop, and the reports."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import outcome

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.experiments import report
from gigabatch.launcher.experiments.papers import PAPERS
from gigabatch.launcher.experiments.run import Outcome, Stopped, run_study
from gigabatch.launcher.experiments.studies import STUDIES, noisy
from gigabatch.launcher.experiments.studies.blocks import pairs_of_views, two_vector_towers
from gigabatch.launcher.experiments.study import Check, Estimate, Metric, Study, Variant
from gigabatch.trainer.run.folder import RunFolder


def _objective(name: str) -> dict[str, Any]:
    return {"objective": {"name": name, "taps": ["one", "two"]}}


SMALL = Study(
    name="small",
    papers=("Symile",),
    claim="Training helps.",
    setting="Pairs.",
    write=pairs_of_views(("one.npy", "two.npy"), latent=4, size=8, train=128, test=40),
    config={
        **two_vector_towers("one", "one.npy", "two", "two.npy", size=8, width=16),
        "batch": {"global_size": 32, "micro_size": 32},
        "train.steps": 30,
        "optimizer": {"lr": 1e-2},
    },
    variants=(
        Variant("first", _objective("infonce")),
        Variant("more", _objective("siglip"), init_from="first"),
    ),
    metrics=(Metric("R@1", "retrieval", "test", "one2two_recall@1"),),
    checks=(Check("first, R@1", lambda mean: mean("first", "R@1"), 0.1),),
)


def never() -> bool:
    return False


@pytest.mark.slow
def test_stopped_study_resumes_and_reads_stored_results(tmp_path: Path) -> None:
    lines: list[str] = []
    polls = iter(range(1000))
    with pytest.raises(Stopped):
        run_study(SMALL, 1, tmp_path, lines.append, lambda: next(polls) > 12)
    interrupted = RunFolder(tmp_path / "runs" / "small-first-0")
    (saved,) = interrupted.steps_saved()
    assert 0 < saved < 30
    outcome = run_study(SMALL, 2, tmp_path, lines.append, never)
    assert interrupted.is_finished()
    assert len(lines) == 4
    assert outcome.results["first"]["R@1"].mean > 0.1
    stored = interrupted.path / "eval" / "test-retrieval-step-00000030.json"
    value = json.loads(stored.read_text())["eval/test/one2two_recall@1"]
    assert outcome.results["first"]["R@1"].values[0] == value
    more = RunFolder(tmp_path / "runs" / "small-more-1").config()
    assert str(more.train.init_from).startswith(str(tmp_path / "runs" / "small-first-1"))

    stored.write_text(json.dumps({"eval/test/one2two_recall@1": 0.0}))
    reread_outcome = run_study(SMALL, 2, tmp_path, lines.append, never)
    assert len(lines) == 4  # no run was trained again
    assert reread_outcome.results["first"]["R@1"].values[0] == 0.0  # read from the file
    with pytest.raises(GigabatchError, match=r"different version of this experiment \(train.steps"):
        run_study(replace(SMALL, config={**SMALL.config, "train.steps": 31}), 1, tmp_path,
                  lines.append, never)  # fmt: skip

    result = report.as_json(outcome)
    assert json.loads(json.dumps(result)) == result
    assert (result["papers"], result["claim"], result["passed"]) == (
        ["Symile"], "Training helps.", True,
    )  # fmt: skip
    assert report.save(tmp_path, SMALL, result) == result
    update = {**result, "seconds": 0.1, "date": "2000-01-01"}
    assert report.save(tmp_path, SMALL, update) == result  # keeps duration and date
    new_text = {"setting": "Reworded."}
    assert report.save(tmp_path, SMALL, update | new_text) == result | new_text
    assert report.load(report.results_file(tmp_path, SMALL)) == result | new_text
    other = {**update, "results": {}}
    assert report.save(tmp_path / "other", SMALL, other) == other
    report.write_report(tmp_path / "docs" / "report.md", tmp_path, [SMALL])
    text = (tmp_path / "docs" / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(PAPERS)
    assert sum("[PASS](#small)" in row for row in rows) == 1
    assert "first  " in text


def _noisy_outcome() -> Outcome:
    """Return results of the noisy-pairs study that pass every check."""
    results = {
        "plain": {"best R@1": Estimate((0.9,)), "final R@1": Estimate((0.4, 0.41))},
        "robust": {"final R@1": Estimate((0.98,)), "AUC of the split": Estimate((0.9,))},
    }
    return Outcome(noisy.STUDY, 2, results, 1.0)


def test_check_lines_state_verdict_variants_metric_value_and_threshold() -> None:
    assert list(report.check_lines(report.as_json(_noisy_outcome()))) == [
        "PASS  robust - plain, final R@1: 0.575 (threshold 0.40)",
        "PASS  plain, best R@1: 0.900 (baseline threshold 0.69)",
        "PASS  plain, final R@1: 0.405 (baseline threshold 0.24)",
    ]
    bounds = [Check("a", lambda _: 1.0, maximum=0.25), Check("b", lambda _: 0.6, 0.595, 0.655)]
    study = replace(noisy.STUDY, checks=tuple(bounds))
    assert list(report.check_lines(report.as_json(replace(_noisy_outcome(), study=study)))) == [
        "FAIL  a: 1.000 (threshold at most 0.25)",
        "PASS  b: 0.600 (threshold 0.595 to 0.655)",
    ]


def test_outcome_of_version_0_1_is_converted_to_the_current_format(tmp_path: Path) -> None:
    new = report.as_json(_noisy_outcome())
    old = {
        "paper": 1, "name": "noisy-pairs",
        **{key: new[key] for key in ("claim", "setting", "seconds", "processor", "date")},
        "figures": {
            variant: {
                name: {"mean": e["mean"], "spread": e["std"], "values": e["values"]}
                for name, e in metrics.items()
            }
            for variant, metrics in new["results"].items()
        },
        "bars": [
            {"what": check["name"], "value": check["value"], "bound": f">= {check['minimum']:g}",
             "baseline": check["baseline"], "holds": check["passed"]}
            for check in new["checks"]
        ],
        "holds": True, "starts": 2,
    }  # fmt: skip
    path = report.results_file(tmp_path, noisy.STUDY)
    path.write_text(json.dumps(old))
    assert report.load(path) == new
    old["paper"] = [39, 51]
    old["bars"][0]["bound"] = ">= 0.5 and <= 0.7"  # type: ignore[index]
    path.write_text(json.dumps(old))
    loaded = report.load(path)
    assert loaded["papers"] == ["MultiCSR", "HEADLINES"]
    assert (loaded["checks"][0]["minimum"], loaded["checks"][0]["maximum"]) == (0.5, 0.7)


def test_command_lists_studies_and_reports_papers_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        return outcome(monkeypatch, capsys, "reproduce", *arguments)

    code, listing, _ = run()
    assert code == 0
    for study in STUDIES:
        assert f"  {study.name} " in listing
    assert not re.search(r"(?m)^\s*\d+(, \d+)* ", listing)  # no numbers of papers
    unmeasured = json.loads(run("12", "--json")[1])
    assert (unmeasured["papers"], unmeasured["passed"], unmeasured["status"]) == (
        ["UniCon-HA, anomaly detection"], None, "not available yet",
    )  # fmt: skip
    assert run("4")[1] == "Contrastive diffusion: out of scope. gigabatch offers: encoders\n"
    code, _, error = run("34", "--out", "/proc/missing")
    assert (code, "--out /proc/missing cannot be created" in error) == (2, True)
    code, _, error = run("56")
    assert (code, "56: no such experiment. Choose one of noisy-pairs," in error) == (2, True)
