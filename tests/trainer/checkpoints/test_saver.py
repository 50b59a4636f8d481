"""Background writes of checkpoints: waiting, errors and kills."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import Command, losses, wait_for_step

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints.format import latest_checkpoint
from gigabatch.trainer.checkpoints.saver import Saver
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.distributed import World
from gigabatch.trainer.monitoring.metrics import read_metrics
from gigabatch.trainer.run.folder import RunFolder

SINGLE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "000001.json").touch()
    return RunFolder(tmp_path)


def saver(run: RunFolder, reports: list[Any] | None = None) -> Saver:
    def report(step: int, tags: Any) -> None:
        if reports is not None:
            reports.append((step, dict(tags)))

    return Saver(run, SINGLE, 1, CheckpointSettings(), report)


def snapshot(step: int, numbers: int = 10) -> Any:
    return lambda: ({"towers": {"w": torch.full((numbers,), float(step))}}, {"step": step})


def save_and_raise(run: RunFolder, error: BaseException, numbers: int = 10) -> None:
    with saver(run) as saving:
        saving.save(1, snapshot(1, numbers))
        raise error


LARGE = 40_000_000  # 160 MB, which take tenths of a second to write and checksum


def test_save_returns_before_the_write_ends(run: RunFolder) -> None:
    reports: list[Any] = []
    with saver(run, reports) as saving:
        saving.save(3, snapshot(3, LARGE))
        assert run.steps_saved() == []
        assert not saving.write_ended()
        saving.finish_write()
        assert run.steps_saved() == [3]
    [(step, tags)] = reports
    assert step == 3
    assert tags.keys() == {"checkpoint/blocked_s", "checkpoint/write_s"}
    assert 0 < tags["checkpoint/blocked_s"] < tags["checkpoint/write_s"]


def test_second_save_waits_for_the_first(run: RunFolder) -> None:
    saved: list[list[int]] = []

    def second_snapshot() -> Any:
        saved.append(run.steps_saved())
        return snapshot(2)()

    with saver(run) as saving:
        saving.save(1, snapshot(1, LARGE))
        saving.save(2, second_snapshot)
    assert saved == [[1]]  # The first write ended before the second snapshot took memory.
    assert run.steps_saved() == [1, 2]


def test_exit_after_an_error_waits_for_the_write(run: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError):
        save_and_raise(run, ZeroDivisionError(), LARGE)
    assert run.steps_saved() == [1]


def test_exit_after_ctrl_c_does_not_wait(run: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_and_raise(run, KeyboardInterrupt(), LARGE)
    assert run.steps_saved() == []
    for thread in threading.enumerate():
        if thread.name == "checkpoint-1":
            thread.join()
    assert run.steps_saved() == [1]


def test_failed_write_replaces_the_error_that_followed(run: RunFolder) -> None:
    run.checkpoints.mkdir()
    (run.checkpoints / ".step-00000001.000001.tmp").write_text("not a folder")
    with pytest.raises(GigabatchError, match="step 1 was not saved"):
        save_and_raise(run, OSError("No space left on device"))


def test_superseded_attempt_commits_nothing(run: RunFolder) -> None:
    with saver(run) as saving:
        saving.save(1, snapshot(1, LARGE))
        (run.path / "attempts" / "000002.json").touch()
        with pytest.raises(GigabatchError, match="superseded by a later one"):
            saving.finish_write()
    assert run.steps_saved() == []
    assert not list(run.checkpoints.glob(".*"))


def suspend_during_a_write(run: RunFolder, command: Command) -> Path:
    """Suspend training while a checkpoint is partly written and a later step has ended.

    Returns the partly written folder.
    """
    process = psutil.Process(command.process.pid)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and command.process.poll() is None:
        partial = list(run.checkpoints.glob(".step-*.tmp"))
        if not partial or max(losses(run.path)) <= int(partial[0].name[6:14]):
            time.sleep(0.001)
            continue
        process.suspend()
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        if partial[0].exists() and not (partial[0] / "manifest.json").exists():
            return partial[0]
        process.resume()
    pytest.fail("no write was suspended before its end")


@pytest.mark.slow
def test_kill_during_a_background_write_loses_nothing(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any
) -> None:
    settings = [
        "train.steps=30", "eval.sets=[]", "towers.image={kind: module, args: {width: 6}}",
        "towers.image.module=support_towers:Heavy",
    ]  # fmt: skip
    reference = [*settings, "checkpoint.every_steps=0", "run.name=full"]
    assert gigabatch("train", tiny, *reference).returncode == 0
    run = RunFolder(tmp_path / "runs" / "a")
    command = start("train", tiny, *settings, "checkpoint.every_steps=8", "run.name=a")
    wait_for_step(run.path, 9, command)  # The write of the first checkpoint has started.
    while not run.steps_saved():
        time.sleep(0.01)
    partial = suspend_during_a_write(run, command)
    children = psutil.Process(command.process.pid).children(recursive=True)
    command.kill()
    command.process.communicate()
    psutil.wait_procs(children, timeout=10)
    newest = run.steps_saved()[-1]
    assert int(partial.name[6:14]) == newest + 8
    assert latest_checkpoint(run).step == newest  # type: ignore[union-attr]

    done = gigabatch("resume", run.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming after step {newest}" in done.stdout
    assert losses(run.path) == losses(tmp_path / "runs" / "full")
    assert not partial.exists()
    lines = [line for line in read_metrics(run.metrics) if "checkpoint/write_s" in line]
    assert [line["step"] for line in lines] == [8, 16, 24, 30]
    assert all(line["checkpoint/blocked_s"] > 0 for line in lines)


@pytest.mark.slow
def test_failed_background_write_ends_all_ranks_with_its_message(
    tiny: Path, tmp_path: Path, start: Any
) -> None:
    settings = [
        "train.steps=60", "eval.sets=[]", "checkpoint.every_steps=20", "run.name=a",
        "cluster.launcher=torchrun", "cluster.workers=2",
    ]  # fmt: skip
    run = RunFolder(tmp_path / "runs" / "a")
    command = start("train", tiny, *settings)
    wait_for_step(run.path, 1, command)
    run.checkpoints.mkdir(exist_ok=True)
    obstacle = run.checkpoints / ".step-00000040.000001.tmp"
    obstacle.write_text("not a folder")
    done = command.wait()
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the checkpoint of step 40 was not saved" in done.stderr
    assert "Earlier checkpoints are intact. Free disk space, then resume." in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((run.path / "attempts").iterdir())) == 1
    assert run.steps_saved() == [20]
    assert max(losses(run.path)) >= 40
