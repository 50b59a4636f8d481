"""Faults in real runs: signals, kills, damage, full disks. No saved progress is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import losses, wait_for_step, write_samples

from gigabatch.trainer.monitoring.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_resume_repeats_missing_evaluations(
    tiny: Path, tmp_path: Path, gigabatch: Any, shards: Path
) -> None:
    settings = ["run.name=a", "eval.every_steps=3", f"eval.sets=[{shards / 'val'}]"]
    assert gigabatch("train", tiny, *settings).returncode == 0
    run = tmp_path / "runs" / "a"
    names = [f"step-{step:08d}.json" for step in (3, 6, 9, 12)]
    assert sorted(p.name for p in (run / "eval").iterdir()) == names
    # As after a kill between saving and evaluating step 9; the checkpoint of step 12 is damaged.
    (run / "eval" / names[2]).unlink()
    (run / "checkpoints" / "step-00000012" / "state.json").write_text("{")
    done = gigabatch("resume", run)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 9" in done.stdout
    assert sorted(p.name for p in (run / "eval").iterdir()) == names
    lines = read_metrics(run / "metrics.jsonl")
    assert {line["step"] for line in lines if "train/loss" not in line} == {3, 6, 9, 12}


def test_evaluation_interrupted_by_a_stop_is_repeated_on_resume(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any
) -> None:
    write_samples(tmp_path / "many" / "wide", 2000, 2000, seed=3)
    settings = [f"eval.sets=[{tmp_path / 'many' / 'wide'}]", "eval.every_steps=4", "run.name=a"]
    run = tmp_path / "runs" / "a"
    command = start(
        "train", tiny, *settings, "checkpoint.every_steps=0", "batch.micro_size=2", "train.steps=5"
    )
    wait_for_step(run, 4, command)  # then 1,000 micro-batches are evaluated
    command.signal(signal.SIGTERM)
    done = command.wait(240)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "wide: recall" not in done.stdout
    assert (run / "checkpoints" / "LATEST").read_text() == "step-00000004\n"
    assert not (run / "eval" / "step-00000004.json").exists()
    assert gigabatch("resume", run, timeout=300).returncode == 0
    assert (run / "eval" / "step-00000004.json").exists()


def test_non_finite_steps_keep_the_last_good_checkpoint(
    tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    settings = [
        "optimizer.lr=1.0e+30",
        "schedule.warmup_steps=0",
        "train.max_grad_norm=0",
        "run.name=a",
    ]
    done = gigabatch("train", tiny, *settings, "checkpoint.every_steps=1", "train.max_bad_steps=4")
    assert done.returncode == 2
    assert "4 consecutive steps" in done.stderr
    saved = [p.name for p in (tmp_path / "runs" / "a" / "checkpoints").glob("step-*")]
    assert saved == ["step-00000001"]
    assert "The last checkpoint is of step 1" in done.stderr


def test_ctrl_c_during_startup_ends_the_command(tiny: Path, start: Any) -> None:
    for moment in (0.8, 1.1, 1.4, 1.7, 2.0):
        command = start("train", tiny, "train.steps=5000", "eval.sets=[]")
        time.sleep(moment)  # during imports, indexing, setup or training
        command.signal(signal.SIGINT)
        done = command.wait(240)
        assert done.returncode in (130, -signal.SIGINT), (moment, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr or moment < 1


def test_resuming_a_run_that_trains_is_rejected(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "a"
    command = start("train", tiny, "train.steps=5000", "eval.sets=[]", "run.name=a")
    wait_for_step(run, 3, command)
    before = (run / "config.yaml").read_text()
    from_shell = gigabatch("resume", run, "monitor.every_steps=7")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    as_rank = gigabatch("resume", run, "monitor.every_steps=7")
    for result in (from_shell, as_rank):
        assert result.returncode == 2
        assert "being trained" in result.stderr
    assert (run / "config.yaml").read_text() == before
    assert command.process.poll() is None


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_run_continues_after_its_output_pipe_closes(tiny: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m gigabatch.launcher train {tiny} run.name=a eval.sets=[] | true"
    subprocess.run(["bash", "-c", command], timeout=240, check=True, capture_output=True)
    assert len(losses(tmp_path / "runs" / "a")) == 12


def test_ctrl_c_stops_a_run_whose_output_pipe_is_closed(
    tiny: Path, tmp_path: Path, start: Any
) -> None:
    """Ctrl-C in `gigabatch train ... 2>&1 | tee log` also ends tee."""
    run = tmp_path / "runs" / "a"
    command = start(
        "train", tiny, "run.name=a", "eval.sets=[]", "train.steps=5000",
        "checkpoint.every_steps=0", "cluster.launcher=torchrun",
    )  # fmt: skip
    wait_for_step(run, 3, command)
    command.process.stdout.close()
    command.process.stderr.close()
    command.signal(signal.SIGINT)
    assert command.process.wait(240) == 130
    assert (run / "checkpoints" / "LATEST").read_text() == f"step-{max(losses(run)):08d}\n"


def test_ranks_exit_when_their_torchrun_is_killed(tiny: Path, tmp_path: Path, start: Any) -> None:
    run = tmp_path / "runs" / "a"
    command = start(
        "train", tiny, "run.name=a", "eval.sets=[]", "train.steps=5000", "cluster.workers=2",
        "checkpoint.every_steps=0", "cluster.launcher=torchrun",
    )  # fmt: skip
    wait_for_step(run, 3, command)
    (torchrun,) = psutil.Process(command.process.pid).children()
    ranks = torchrun.children(recursive=True)
    torchrun.kill()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    for process in alive:
        process.kill()
    assert not alive
    done = command.wait(240)
    assert done.returncode == 2
    assert f"gigabatch resume {run}" in done.stderr


@pytest.mark.parametrize(
    ("launcher", "workers", "number", "code"),
    [
        ("inline", 1, signal.SIGINT, 130),
        ("torchrun", 2, signal.SIGUSR2, 75),
        ("ray", 2, signal.SIGTERM, 75),
    ],
)
def test_signal_saves_a_checkpoint_and_resume_continues(
    launcher: str, workers: int, number: signal.Signals, code: int, tiny: Path, tmp_path: Path,
    start: Any, gigabatch: Any,
) -> None:  # fmt: skip
    settings = [
        f"cluster.launcher={launcher}", f"cluster.workers={workers}", "train.steps=300",
        "eval.sets=[]", "checkpoint.every_steps=0", "schedule.name=constant",
    ]  # fmt: skip
    run = tmp_path / "runs" / "a"
    command = start("train", tiny, *settings, "run.name=a")
    wait_for_step(run, 5, command)
    children = psutil.Process(command.process.pid).children(recursive=True)
    command.signal(number)
    done = command.wait(240)
    assert done.returncode == code, done.stdout + done.stderr
    assert "stopping after this step" in done.stderr
    assert f"gigabatch resume {run}" in done.stdout
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive
    stopped = max(losses(run))
    assert (run / "checkpoints" / "LATEST").read_text() == f"step-{stopped:08d}\n"
    # Any launcher can resume the run; `inline` starts fastest.
    inline = ["cluster.launcher=inline", "cluster.workers=1"]
    more = [f"train.steps={stopped + 2}", "--allow", "train.steps"]
    resumed = gigabatch("resume", run, *inline, *more)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert sorted(losses(run)) == list(range(1, stopped + 3))
    if launcher == "inline":  # all steps ran in one process, so losses are equal bit for bit
        reference = gigabatch("train", tiny, *settings, more[0], "run.name=reference")
        assert reference.returncode == 0, reference.stderr
        assert losses(run) == losses(tmp_path / "runs" / "reference")


def ray_workers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
    ]


def test_rank_killed_under_ray_is_restarted(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any
) -> None:
    settings = ["cluster.workers=2", "train.steps=40", "eval.sets=[]", "checkpoint.every_steps=4"]
    torchrun = ["cluster.launcher=torchrun", "run.name=reference"]
    reference = gigabatch("train", tiny, *settings, *torchrun)
    assert reference.returncode == 0, reference.stderr
    run = tmp_path / "runs" / "a"
    command = start("train", tiny, *settings, "cluster.launcher=ray", "run.name=a")
    wait_for_step(run, 6, command)
    children = {p.pid for p in psutil.Process(command.process.pid).children(recursive=True)}
    victims = [p for p in ray_workers() if p.pid in children]
    assert victims
    os.kill(victims[-1].pid, signal.SIGKILL)
    done = command.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attempt 2: 2 workers" in done.stdout
    text = (run / "metrics.jsonl").read_text()
    assert '"attempt": 2' in text
    assert losses(run) == losses(tmp_path / "runs" / "reference")


@pytest.mark.parametrize("launcher", ["inline", "ray"])
def test_damaged_image_stops_the_run_without_a_restart(
    launcher: str, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    root = tmp_path / "data"
    write_samples(root / "train", 32, 32, seed=1)
    shard = root / "train" / "train-000.tar"
    data = bytearray(shard.read_bytes())
    offset = data.index(b"\x89PNG")
    data[offset : offset + 64] = bytes(64)
    shard.write_bytes(bytes(data))
    done = gigabatch(
        "train", tiny, f"data.root={root}", "eval.sets=[]", f"cluster.launcher={launcher}",
        "cluster.workers=1", "run.name=a",
    )  # fmt: skip
    assert done.returncode == 2
    assert f"gigabatch: {root}/train: 11 of 352 samples read could not be used" in done.stderr
    record = (tmp_path / "runs" / "a" / "quarantine.jsonl").read_text()
    assert f"{shard}: sample 's00000': the image cannot be decoded" in record
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs" / "a" / "attempts").iterdir())) == 1


def test_full_disk_stops_the_run_and_keeps_its_checkpoints(
    tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=460k", "none", str(disk)], check=True)
    try:
        settings = [f"run.dir={disk}", "run.name=a", "eval.sets=[]", "checkpoint.keep=9"]
        done = gigabatch("train", tiny, *settings)
        assert done.returncode == 2, done.stdout
        assert "No space left" in done.stderr
        assert not list((disk / "a" / "checkpoints").glob(".*"))
        saved = list((disk / "a" / "checkpoints").glob("step-*"))
        assert saved, "the disk was too small for the test"
        subprocess.run(["mount", "-o", "remount,size=50M", str(disk)], check=True)
        resumed = gigabatch("resume", disk / "a")
        assert resumed.returncode == 0, resumed.stderr
        assert sorted(losses(disk / "a")) == list(range(1, 13))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(("launcher", "restarts"), [("torchrun", 0), ("ray", 1)])
def test_only_the_traceback_of_the_first_failed_rank_is_shown(
    launcher: str, restarts: int, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    done = gigabatch(
        "train", tiny, f"cluster.launcher={launcher}", "cluster.workers=2", "eval.sets=[]",
        f"cluster.max_restarts={restarts}", "run.name=a", "checkpoint.every_steps=0",
        "towers.image={kind: module, module: 'support_towers:CrashingOnRankOne'}", timeout=240,
    )  # fmt: skip
    assert done.returncode == 2
    message = done.stderr[done.stderr.index("the workers failed:") :]
    assert message.splitlines()[1].startswith("rank 1 on "), message
    assert message.count("Traceback (most recent call last)") == 1
    assert "RuntimeError: this tower is out of order" in message
    assert "support_towers.py" in message
    attempts = len(list((tmp_path / "runs" / "a" / "attempts").iterdir()))
    assert attempts == 1 + restarts  # retries are limited


def contents(run: Path, *names: str) -> dict[str, bytes]:
    """Return the bytes of the matching files, by relative path."""
    files = [path for name in names for path in run.glob(name) if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_superseded_process_changes_nothing_in_the_run(
    tiny: Path, tmp_path: Path, start: Any
) -> None:
    fast = tmp_path / "fast"
    tower = f"towers.image={{kind: module, module: 'support_towers:Slow', args: {{fast: {fast}}}}}"
    first = start(
        "train",
        tiny,
        "run.name=a",
        "eval.sets=[]",
        "train.steps=9",
        "checkpoint.every_steps=1",
        tower,
    )
    run = tmp_path / "runs" / "a"
    wait_for_step(run, 3, first)
    first.signal(signal.SIGSTOP)
    (run / "lock").unlink()  # as on another host and a file system without locks
    fast.touch()
    second = start("resume", run).wait()
    assert second.returncode == 0, second.stderr
    files = ("metrics.jsonl", "checkpoints/**/*", "eval/*", "attempts/*", "*.txt", "stop*", "save")
    # The first process may have been stopped during a write.
    unfinished = f".{first.process.pid}.tmp"
    before = {k: v for k, v in contents(run, *files).items() if not k.endswith(unfinished)}
    assert "checkpoints/step-00000009/manifest.json" in before
    fast.unlink()
    first.signal(signal.SIGCONT)
    done = first.wait()
    assert done.returncode == 2, done.stdout + done.stderr
    assert "attempt 1 was superseded: a later attempt trains this run" in done.stderr
    assert contents(run, *files) == before
    assert {line["attempt"] for line in read_metrics(run / "metrics.jsonl")} == {1, 2}
