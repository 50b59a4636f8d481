"""Samples damaged after indexing: records, and equal substitutes at any world size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import spoil

from gigabatch.data.shards.indexing import open_index
from gigabatch.trainer.monitoring.metrics import read_metrics

DAMAGED = (30, 77, 150)


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """Return an indexed data set with three samples that were damaged after indexing."""
    root = tmp_path / "damaged"
    for name in ("train", "val"):
        shutil.copytree(shards / name, root / name)
    index = open_index(root / "train")
    for sample in DAMAGED:
        spoil(index, sample)
    return root


def read_records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["step"], line["micro_batch"], line["sample"]))


@pytest.mark.slow
def test_run_replaces_and_records_damaged_samples(
    damaged: Path, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    # Seven steps of 32 samples are a little more than one epoch of 200.
    options = [f"data.root={damaged}", "train.steps=7", "run.name=r", "eval.sets=[]"]
    done = gigabatch("train", tiny, *options)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "r"
    records = read_records(run)
    assert {line["sample"] for line in records} == set(DAMAGED)
    for line in records:
        assert f"train-{line['sample'] // 50:03d}.tar: at byte " in line["why"]
        assert line["key"] == f"s{line['sample']:05d}"
        assert line["attempt"] == 1
    assert "replaced an unreadable sample" in (run / "train.log").read_text()
    last = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line][-1]
    assert last["data/bad_samples"] == len(records)


@pytest.mark.slow
def test_worker_stops_if_shards_changed_since_the_start(
    damaged: Path, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    """A restarted worker would continue with different samples."""
    settings = [f"data.root={damaged}", "eval.sets=[]", "train.steps=3"]
    assert gigabatch("train", tiny, *settings, "run.name=a").returncode == 0
    run = tmp_path / "runs" / "a"
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("steps: 3", "steps: 9")
    )
    shutil.copy(damaged / "val" / "val-000.tar", damaged / "train")
    worker = [sys.executable, "-m", "gigabatch.launcher.worker", run, "1"]
    assert subprocess.run(worker, capture_output=True).returncode != 0
    assert "differ from those that the run started" in (run / "failure.txt").read_text()


@pytest.mark.slow
def test_evaluation_reports_damaged_samples(
    damaged: Path, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    spoil(open_index(damaged / "val"), 9)
    done = gigabatch("train", tiny, f"data.root={damaged}", "train.steps=2", "run.name=a")
    assert done.returncode == 0
    assert (
        "val: 1 of 60 samples are unusable" in (tmp_path / "runs" / "a" / "train.log").read_text()
    )


@pytest.mark.slow
def test_more_damaged_samples_than_allowed_stop_the_run(
    damaged: Path, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    options = [f"data.root={damaged}", "data.max_damaged=0.0002", "run.name=r", "eval.sets=[]"]
    done = gigabatch("train", tiny, *options)
    assert done.returncode == 2
    assert "could not be used, more than data.max_damaged=0.0002 allows" in done.stderr
    assert f"gigabatch data check {damaged}/train" in done.stderr


@pytest.mark.slow
def test_substitutes_are_equal_on_two_workers_and_after_a_resume(
    damaged: Path, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    root = [f"data.root={damaged}", "eval.sets=[]", "train.steps=9"]
    assert gigabatch("train", tiny, *root, "run.name=one").returncode == 0
    two = ["cluster.launcher=torchrun", "cluster.workers=2", "data.workers=0"]
    assert gigabatch("train", tiny, *root, *two, "run.name=two").returncode == 0
    runs = tmp_path / "runs"
    assert gigabatch("train", tiny, *root[:2], "train.steps=4", "run.name=short").returncode == 0
    resumed = gigabatch("resume", runs / "short", "train.steps=9", "--allow", "train.steps")
    assert resumed.returncode == 0, resumed.stderr
    records = [
        [{k: v for k, v in line.items() if k != "attempt"} for line in read_records(runs / name)]
        for name in ("one", "two", "short")
    ]
    assert records[0] == records[1] == records[2]
    lines = read_metrics(runs / "short" / "metrics.jsonl")
    counts = [line["data/bad_samples"] for line in lines if "data/bad_samples" in line]
    assert counts[-1] == len(records[0])
