"""Killed and resumed runs have the same losses, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import Command, losses, wait_for_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gigabatch.launcher.bench.rank_processes import process_tree, rank_processes
from gigabatch.trainer.monitoring.metrics import read_metrics, read_samples


def kill_all(command: Command) -> None:
    """Send SIGKILL to the launcher and all its descendants at once."""
    processes = process_tree(command.process.pid)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    command.process.communicate()
    psutil.wait_procs(processes, timeout=10)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "zero"), [("bf16", 0), ("fp32", 2)])
def test_killed_and_resumed_run_has_equal_losses(
    precision: str, zero: int, tiny: Path, tmp_path: Path, start: Any, gigabatch: Any
) -> None:
    settings = [
        f"train.precision={precision}", f"train.zero_stage={zero}", "train.steps=14",
        "eval.sets=[]",
        "cluster.launcher=torchrun", "cluster.workers=2",
    ]  # fmt: skip
    assert gigabatch("train", tiny, *settings, "run.name=full").returncode == 0
    full = losses(tmp_path / "runs" / "full")
    assert sorted(full) == list(range(1, 15))

    # Kill times differ between parameters but not between test runs.
    kill_times = random.Random(f"{precision}{zero}")
    killed = tmp_path / "runs" / "killed"
    command = start("train", tiny, *settings, "run.name=killed", "cluster.max_restarts=3")
    wait_for_step(killed, kill_times.randint(4, 6), command)
    kill_all(command)
    command = start("resume", killed)
    wait_for_step(killed, kill_times.randint(8, 10), command)
    # Kill a single rank: torchrun restarts both.
    victim = rank_processes(command.process.pid)[kill_times.randint(0, 1)]
    victim.send_signal(signal.SIGKILL)
    done = command.wait()
    assert done.returncode == 0, done.stdout + done.stderr

    assert losses(killed) == full
    attempts = {line["attempt"] for line in read_metrics(killed / "metrics.jsonl")}
    assert len(attempts) >= 2
    assert max(int(p.stem) for p in (killed / "attempts").glob("*.json")) >= 3
    assert_tensorboard_has_each_step_once(killed, full)


def assert_tensorboard_has_each_step_once(run: Path, full: dict[int, float]) -> None:
    accumulator = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0})
    accumulator.Reload()
    events = accumulator.Scalars("train/loss")
    assert [event.step for event in events] == sorted(full)
    assert [event.value for event in events] == pytest.approx(list(full.values()), rel=1e-6)


@pytest.mark.slow
def test_world_sizes_and_zero_stages_agree_and_resume_each_other(
    tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    """With dropout and augmentation in fp32, runs on 1, 2 and 3 ranks agree, also when resumed on
    another number of ranks. With 3 ranks some micro-batches are padding."""
    settings = [
        tiny, "train.steps=20", "eval.sets=[]", "checkpoint.every_steps=8", "checkpoint.keep=9",
        "cluster.launcher=torchrun", "monitor.record_samples=true",
    ]  # fmt: skip
    one, two, three = (tmp_path / "runs" / f"w{workers}" for workers in (1, 2, 3))
    for run, workers, zero in ((one, 1, 1), (two, 2, 3), (three, 3, 1)):
        done = gigabatch("train", *settings, f"cluster.workers={workers}",
                         f"train.zero_stage={zero}",
                         f"run.name={run.name}")  # fmt: skip
        assert done.returncode == 0, done.stderr
    samples = read_samples(one / "samples.jsonl")
    assert [len(samples[step]) for step in range(1, 21)] == [32] * 20
    expected = losses(one)
    assert len(expected) == 20
    for run in (two, three):
        assert losses(run) == pytest.approx(expected, rel=1e-5)
        assert read_samples(run / "samples.jsonl") == samples
    for workers, zero in ((3, 3), (1, 1)):
        for step in (16, 20):
            shutil.rmtree(two / "checkpoints" / f"step-{step:08d}")
        done = gigabatch("resume", two, f"cluster.workers={workers}", f"train.zero_stage={zero}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert losses(two) == pytest.approx(expected, rel=1e-5)
        assert read_samples(two / "samples.jsonl") == samples
