"""Benchmark of faults: cost of a kill."""

from __future__ import annotations

import json
from pathlib import Path

from gigabatch.launcher.bench.faults import Kill, _cost


def test_repeated_steps_are_counted_from_trained_steps(tmp_path: Path) -> None:
    lines = [
        *({"step": step, "time": step, "train/loss": 1.0} for step in (1, 2, 3, 4, 5, 6)),
        {"step": 4, "time": 6.5, "checkpoint/write_s": 1.0},  # written two steps later
        {"step": 4, "time": 19.0, "checkpoint/write_s": 1.0},
        {"step": 5, "time": 20.0, "train/loss": 1.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost = _cost(path, Kill("a rank", 7.0))
    assert cost == {"after_step": 6, "to_next_s": 13.0, "repeated": 2}
