"""metrics.jsonl and TensorBoard over several attempts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.monitoring.metrics import Monitor, format_duration, read_metrics
from gigabatch.trainer.run.folder import RunFolder


def attempt(run: RunFolder, number: int, first: int, last: int, value: float) -> None:
    """Write the metrics of an attempt, steps first to last; losses are value + step."""
    (run.path / "attempts").mkdir(parents=True, exist_ok=True)
    (run.path / "attempts" / f"{number:06d}.json").touch()
    monitor = Monitor(run, number, first, 10)
    for step in range(first, last + 1):
        monitor.report(step, step * 4, {"train/loss": value + step})
    monitor.close()


def test_later_attempt_replaces_earlier_lines_from_its_first_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    attempt(run, 1, 1, 6, 100.0)
    attempt(run, 2, 4, 5, 200.0)
    attempt(run, 3, 5, 7, 300.0)
    lines = read_metrics(run.metrics)
    assert [(line["attempt"], line["step"]) for line in lines] == [
        (1, 1), (1, 2), (1, 3), (2, 4), (3, 5), (3, 6), (3, 7),
    ]  # fmt: skip
    assert [line["samples_seen"] for line in lines] == [4 * line["step"] for line in lines]


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    attempt(run, 1, 1, 6, 100.0)
    attempt(run, 2, 4, 7, 200.0)
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 101), (2, 102), (3, 103), (4, 204), (5, 205), (6, 206), (7, 207),
    ]  # fmt: skip


def test_event_files_of_the_same_second_keep_their_order(tmp_path: Path) -> None:
    # File names end in a per-process counter; as text, the tenth file sorts before the ninth.
    for number in range(1, 3):
        for name in range(6):
            attempt(RunFolder(tmp_path / str(name)), number, 3 * number, 3 * number + 3, 0.0)
    for name in range(6):
        events = EventAccumulator(str(RunFolder(tmp_path / str(name)).tensorboard))
        events.Reload()
        assert [e.step for e in events.Scalars("train/loss")] == [3, 4, 5, 6, 7, 8, 9]


def test_clock_behind_earlier_events_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    run.tensorboard.mkdir()
    (run.tensorboard / f"events.out.tfevents.{time.time() + 3600:.0f}.host.1.0").touch()
    attempt(run, 1, 1, 1, 0.0)
    assert "1 h 00 min ahead of this machine's clock" in caplog.text


def test_incomplete_last_line_is_skipped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    attempt(run, 1, 1, 3, 0.0)
    run.metrics.write_text(run.metrics.read_text()[:-20])
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 2]


def test_attempt_that_only_evaluates_replaces_no_lines(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    attempt(run, 1, 1, 3, 0.0)
    (run.path / "attempts" / "000002.json").touch()
    monitor = Monitor(run, 2, 4, 10)
    monitor.report(3, 12, {"eval/val/candidates": 5.0})
    monitor.close()
    assert [(line["attempt"], line["step"]) for line in read_metrics(run.metrics)] == [
        (1, 1), (1, 2), (1, 3), (2, 3),
    ]  # fmt: skip


def test_attempt_after_an_incomplete_line_starts_a_new_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    attempt(run, 1, 1, 3, 0.0)
    run.metrics.write_text(run.metrics.read_text()[:-20])
    attempt(run, 2, 3, 4, 0.0)
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 2, 3, 4]


def test_non_finite_value_is_null(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    attempt(run, 1, 1, 1, float("nan"))
    assert json.loads(run.metrics.read_text())["train/loss"] is None


def test_superseded_attempt_cannot_write_metrics(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "attempts").mkdir()
    old = Monitor(run, 1, 1, 10)
    (tmp_path / "attempts" / "000002.json").touch()
    with pytest.raises(GigabatchError, match="later attempt"):
        old.report(1, 4, {"train/loss": 1.0})
    old.close()
    assert run.metrics.read_text() == ""


def test_lines_are_flat_json_with_exact_floats(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    attempt(run, 1, 1, 1, 0.1)
    line = json.loads(run.metrics.read_text())
    assert line["train/loss"] == 0.1 + 1
    assert {"step", "samples_seen", "time", "attempt"} <= line.keys()


@pytest.mark.parametrize(
    ("seconds", "text"), [(42.4, "42 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_format_duration_uses_fitting_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
