"""Hanging ranks: report with stacks, end, restart."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import losses, wait_for_step

pytestmark = pytest.mark.slow


def test_stopped_rank_is_reported_and_the_group_restarted(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any
) -> None:
    settings = [
        "cluster.workers=2", "cluster.launcher=torchrun", "train.steps=14", "eval.sets=[]",
        "checkpoint.every_steps=4", "train.hang_timeout_s=6",
    ]  # fmt: skip
    reference = gigabatch("train", tiny, *settings, "run.name=reference")
    assert reference.returncode == 0, reference.stderr
    assert not (tmp_path / "runs" / "reference" / "hangs").exists()
    assert not list((tmp_path / "runs" / "reference" / "heartbeats").iterdir())
    run = tmp_path / "runs" / "a"
    command = start("train", tiny, *settings, "run.name=a")
    wait_for_step(run, 6, command)
    heartbeat = json.loads((run / "heartbeats" / "attempt-000001-rank-1.json").read_text())
    victim = psutil.Process(heartbeat["pid"])
    victim.send_signal(signal.SIGSTOP)
    done = command.wait(240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (
        f"no progress for 6 s: rank 1 (process {victim.pid} on {heartbeat['host']}) stopped in step"
    )
    assert report in done.stdout
    assert "rank 0 waits for it" in done.stdout
    assert "attempt 2: 2 workers" in done.stdout
    assert not victim.is_running()
    stacks = (run / "hangs" / "attempt-000001-rank-0.txt").read_text()
    assert "Thread 0x" in stacks
    assert "watchdog.py" in stacks
    assert "loop.py" in stacks
    assert losses(run) == losses(tmp_path / "runs" / "reference")


def test_stuck_process_exits_and_keeps_its_stack(
    tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    done = gigabatch(
        "train", tiny, "run.name=a", "eval.sets=[]", "train.hang_timeout_s=5", "train.steps=40",
        "towers.image={kind: module, module: 'support_towers:Stuck'}", timeout=240,
    )  # fmt: skip
    assert done.returncode == 1
    assert "is in step 13, phase embed, for" in done.stderr
    stacks = (tmp_path / "runs" / "a" / "hangs" / "attempt-000001-rank-0.txt").read_text()
    assert "support_towers.py" in stacks
    assert (tmp_path / "runs" / "a" / "checkpoints" / "LATEST").exists()
    assert os.listdir(tmp_path / "runs" / "a" / "heartbeats")


def test_hang_is_ended_although_the_disk_is_full(tiny: Path, tmp_path: Path, start: Any) -> None:
    run = tmp_path / "runs" / "a"
    command = start(
        "train", tiny, "run.name=a", "eval.sets=[]", "train.hang_timeout_s=5", "train.steps=40",
        "towers.image={kind: module, module: 'support_towers:Stuck'}",
    )  # fmt: skip
    wait_for_step(run, 3, command)
    for name in ("hangs", "crash.txt"):  # writes fail as on a full disk
        (run / name).symlink_to("/dev/full")
    done = command.wait(240)
    assert done.returncode == 1
    assert "is in step 13, phase embed, for" in done.stderr


@pytest.mark.parametrize("launcher", ["inline", "torchrun"])
def test_step_longer_than_the_grace_time_is_abandoned(
    launcher: str, tiny: Path, tmp_path: Path, start: Any
) -> None:
    run = tmp_path / "runs" / "a"
    command = start(
        "train", tiny, "run.name=a", "eval.sets=[]", "cluster.grace_s=1", "train.steps=40",
        f"cluster.launcher={launcher}",
        "towers.image={kind: module, module: 'support_towers:Stuck'}",
    )  # fmt: skip
    wait_for_step(run, 12, command)
    command.signal(signal.SIGUSR2)
    start_time = time.monotonic()
    done = command.wait(240)
    assert 1 <= time.monotonic() - start_time < 30
    assert done.returncode == 75, done.stdout + done.stderr
    assert (
        "not finished within cluster.grace_s=1 s; the run has the checkpoint of step 12"
        in done.stderr
    )
    assert f"gigabatch resume {run}" in done.stderr
