"""Slow ranks: named in the metrics and the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gigabatch.trainer.monitoring.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_slow_rank_is_reported_by_its_number(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    done = gigabatch(
        "train", tiny, "cluster.workers=2", "cluster.launcher=torchrun", "train.steps=6",
        "eval.sets=[]", "run.name=a",
        "towers.image={kind: module, module: 'support_towers:SlowOnRankOne'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")
    lines = [line for line in lines if "train/loss" in line]
    later_lines = lines[1:]  # in the first step, any rank may wait for its loader
    assert [line["perf/slowest_rank"] for line in later_lines] == [1.0] * 5
    assert all(line["perf/straggler_ratio"] > 1.5 for line in later_lines)
    assert done.stdout.count("rank 1 is slow: up to step") == 1
    events = EventAccumulator(str(tmp_path / "runs" / "a" / "tb"))
    events.Reload()
    assert [event.value for event in events.Scalars("perf/slowest_rank")][1:] == [1.0] * 5


def test_single_worker_reports_no_straggler(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    assert gigabatch("train", tiny, "train.steps=2", "eval.sets=[]", "run.name=a").returncode == 0
    lines = read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")
    assert not any("perf/straggler_ratio" in line for line in lines)
