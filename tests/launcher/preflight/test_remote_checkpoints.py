"""Runs that copy checkpoints to an S3 server or a disk and resume from the copies."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import FailingServer, make_bucket, s3_server
from support import Command, losses

from gigabatch.launcher.cli import app as cli
from gigabatch.trainer.checkpoints.remote import RemoteRun
from gigabatch.trainer.monitoring.metrics import read_metrics
from gigabatch.trainer.run.folder import RunFolder


@pytest.fixture
def s3() -> Iterator[FailingServer]:
    with s3_server() as server:
        make_bucket(server, "remote-runs")
        server.requests.clear()
        yield server


def kill_during_second_copy(command: Command, server: FailingServer) -> None:
    """Kill all processes before the server answers the upload of towers.safetensors."""
    upload_started, release = threading.Event(), threading.Event()
    server.before(
        lambda: (upload_started.set(), release.wait(60)),
        method="PUT",
        path="*/towers*",
        skip=1,
        times=1,
    )
    try:
        while not upload_started.wait(0.1):
            if command.process.poll() is not None:
                pytest.fail("".join(command.process.communicate()))
        children = psutil.Process(command.process.pid).children(recursive=True)
        command.kill()
        for child in children:
            if child.is_running():
                child.kill()
        psutil.wait_procs(children, timeout=10)
        command.process.communicate()
    finally:
        release.set()


@pytest.mark.slow
def test_run_killed_during_a_copy_resumes_from_the_previous_copy(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any, s3: FailingServer
) -> None:
    settings = ["eval.sets=[]"]
    assert gigabatch("train", tiny, *settings, "run.name=reference").returncode == 0
    reference = losses(tmp_path / "runs" / "reference")

    url = "s3://remote-runs/copies/a"
    s3.status(503, method="PUT", path="*step-00000003/towers*", times=1)
    command = start("train", tiny, *settings, "run.name=a", f"checkpoint.copy_to={url[:-2]}")
    kill_during_second_copy(command, s3)
    log = (tmp_path / "runs" / "a" / "train.log").read_text()
    assert "HTTP 503" in log
    assert f"copied checkpoint step-00000003 to {url}" in log
    s3.clear_rules()
    remote = RemoteRun(url)
    assert remote.steps() == [3]
    unfinished = {
        path for path in remote.files("checkpoints") if not path.startswith("step-00000003")
    }
    assert {path.partition("/")[2] for path in unfinished} >= {"moments.safetensors", "state.json"}

    shutil.rmtree(tmp_path / "runs" / "a")
    done = gigabatch("resume", url, f"run.dir={tmp_path / 'other'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fetched checkpoint step-00000003" in done.stderr
    assert "resuming after step 3" in done.stdout
    run = RunFolder(tmp_path / "other" / "a")
    assert losses(run.path) == reference
    assert run.steps_saved() == [6, 9, 12]
    assert remote.steps()[-1] == 12
    assert {path.partition("/")[0] for path in remote.files("checkpoints")} == {
        f"step-{step:08d}" for step in remote.steps()
    }  # an interrupted copy is removed or completed
    assert remote.newest_attempt() == 2
    last = [line for line in read_metrics(run.metrics) if "checkpoint/copied_step" in line][-1]
    assert (last["checkpoint/copied_step"], last["checkpoint/copy_failures"]) == (12, 0)


@pytest.mark.slow
def test_damaged_checkpoints_are_restored_by_resuming_from_the_url(
    tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    url = f"file://{tmp_path}/remote/a"
    settings = [f"checkpoint.copy_to={url[:-2]}", "checkpoint.keep=9", "run.name=a"]
    done = gigabatch("train", tiny, *settings)
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "runs" / "a")
    reference = losses(run.path)
    for step in (9, 12):
        (run.checkpoints / f"step-{step:08d}" / "towers.safetensors").write_bytes(b"damaged")

    # Resuming from the URL fetches the copy of the last step, so no step remains.
    done = gigabatch("resume", url)
    assert done.returncode == 2
    assert "fetched checkpoint step-00000012" in done.stderr
    assert "the run is finished (12 steps)" in done.stderr

    (run.checkpoints / "step-00000012" / "towers.safetensors").write_bytes(b"damaged")
    done = gigabatch("resume", run.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{url} has a newer checkpoint, of step 12; resuming from step 6" in done.stderr
    assert "resuming after step 6" in done.stdout
    assert losses(run.path) == reference
    state = RemoteRun(url).read("checkpoints/step-00000012/state.json")
    assert json.loads(state or "")["attempt"] == 2  # step 12 was trained and copied again


@pytest.mark.slow
def test_failing_copies_do_not_stop_the_run(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    remote_folder = tmp_path / "remote"
    remote_folder.mkdir()
    settings = [f"checkpoint.copy_to=file://{remote_folder}", "run.name=a", "eval.sets=[]"]
    (remote_folder / "a" / "checkpoints").mkdir(parents=True)
    # Blocks the folder of one checkpoint: every write into it fails.
    obstacle = remote_folder / "a" / "checkpoints" / "step-00000012"
    obstacle.symlink_to("/proc/missing")
    done = gigabatch("train", tiny, *settings)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("checkpoint step-00000012 was NOT COPIED") == 2
    )  # the run retries once at its end
    remote = RemoteRun(f"file://{remote_folder}/a")
    assert 12 not in remote.steps()
    run = RunFolder(tmp_path / "runs" / "a")
    assert run.steps_saved() == [6, 9, 12]
    assert len(losses(run.path)) == 12
    last = [line for line in read_metrics(run.metrics) if "checkpoint/copy_failures" in line][-1]
    assert last["checkpoint/copy_failures"] == 2

    obstacle.unlink()
    done = gigabatch("resume", run.path)  # training is finished, but its last copy is missing
    assert done.returncode == 0, done.stderr
    assert remote.steps()[-1] == 12
    done = gigabatch("resume", run.path)
    assert done.returncode == 2
    assert "the run is finished (12 steps)" in done.stderr


@pytest.mark.slow
def test_stop_waits_for_the_copy_at_most_the_grace_time(
    tiny: Path, tmp_path: Path, start: Any, s3: FailingServer
) -> None:
    upload_started, release = threading.Event(), threading.Event()
    s3.before(lambda: (upload_started.set(), release.wait(60)), method="PUT", path="*/towers*")
    settings = ["checkpoint.copy_to=s3://remote-runs", "run.name=a", "train.steps=5000"]
    command = start("train", tiny, *settings, "eval.sets=[]", "cluster.grace_s=4")
    try:
        assert upload_started.wait(240)
        command.signal(signal.SIGTERM)
        done = command.wait(240)
    finally:
        release.set()
    assert done.returncode == 75, done.stdout + done.stderr
    assert "the copy of the checkpoint was not finished within cluster.grace_s=4 s" in done.stderr
    assert RunFolder(tmp_path / "runs" / "a").stopped()


def error_of_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    """Run a command that fails with exit code 2 in this process; return its message."""
    monkeypatch.setattr(sys, "argv", ["gigabatch", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    return capsys.readouterr().err


def test_unusable_copy_url_is_rejected_before_files_are_created(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*arguments: object) -> str:
        return error_of_command(monkeypatch, capsys, *arguments)

    err = message("train", tiny, "checkpoint.copy_to=file:///proc/missing", "run.name=a")
    assert "checkpoint.copy_to: file:///proc/missing/.probe-" in err
    assert "cannot be written" in err
    assert "Set checkpoint.copy_to to a folder where you may write" in err
    (tmp_path / "remote" / "a").mkdir(parents=True)
    (tmp_path / "remote" / "a" / "environment.json").write_text("{}")
    err = message("train", tiny, f"checkpoint.copy_to=file://{tmp_path}/remote/", "run.name=a")
    assert (
        f"run.name: file://{tmp_path}/remote/a (checkpoint.copy_to) contains copies of a run" in err
    )
    assert not (tmp_path / "runs").exists()

    assert "s3://BUCKET/FOLDER" in message("resume", "s3:///x")
    assert "HUSH" not in message("resume", "s3://me:HUSH@bucket/a")
    assert "not a copy of a run" in message("resume", f"file://{tmp_path}/remote/b")


@pytest.mark.slow
def test_missing_bucket_is_rejected_before_files_are_created(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    s3: FailingServer,
) -> None:
    override = "checkpoint.copy_to=s3://no-such-bucket/x"
    err = error_of_command(monkeypatch, capsys, "train", tiny, override)
    assert "checkpoint.copy_to: s3://no-such-bucket/x/.probe-" in err
    assert "HTTP 404 (The specified bucket does not exist)" in err
    assert not (tmp_path / "runs").exists()
    assert s3.count("PUT") == 1
