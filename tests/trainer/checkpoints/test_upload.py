"""Checkpoint copies on a failing S3 server and on disk: completeness, order, ownership."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from remote_folder import NUMBERS
from servers import FailingServer, make_bucket, s3_server
from support_copies import KEEP_NINE, copy, make_run, save

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.access import FileTaken, Retry, check_writable, write
from gigabatch.trainer.checkpoints.remote import RemoteRun, UploadSuperseded
from gigabatch.trainer.checkpoints.upload import Copier, copy_checkpoint, retain_copies
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.folder import RunFolder

QUICK_RETRY = Retry(attempts=3, first_wait_s=0.01, timeout_s=20)
KEEP_ONE = CheckpointSettings(keep=1)
TIMEOUT_S = 30.0  # far longer than any wait in these tests


@pytest.fixture(scope="module")
def server() -> Iterator[FailingServer]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server: FailingServer) -> RemoteRun:
    """Return an empty folder on S3; its client exists, because creating the first takes long."""
    bucket = f"copies-{next(NUMBERS)}"
    server.clear_rules()
    make_bucket(server, bucket)
    remote = RemoteRun(f"s3://{bucket}/remote/a", QUICK_RETRY)
    assert remote.files() == {}
    server.requests.clear()
    return remote


@pytest.fixture
def disk(tmp_path: Path) -> RemoteRun:
    return RemoteRun(f"file://{tmp_path}/remote/a", QUICK_RETRY)


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def remote(request: pytest.FixtureRequest) -> RemoteRun:
    remote_run = request.getfixturevalue(request.param)
    assert isinstance(remote_run, RemoteRun)
    return remote_run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "a")


def path_in_checkpoints(path: str) -> str:
    return path.partition("checkpoints/")[2]


@pytest.fixture
def copiers() -> Iterator[list[Copier]]:
    """Yield a list of copiers to wait for when the test ends."""
    started: list[Copier] = []
    yield started
    for copier in started:
        copier.wait(lambda: None)


@pytest.fixture
def log_text(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, "gigabatch")
    return lambda: "\n".join(caplog.messages)


def test_copy_holds_checkpoint_and_files_to_resume(remote: RemoteRun, run: RunFolder) -> None:
    run.metrics.write_text('{"step": 1}\n')
    run.write_evaluation(3, {"eval/val/mean_recall@10": 0.5})
    remote.claim(run)
    assert copy(remote, run, 3)
    names = ["manifest.json", "moments.safetensors", "state.json", "towers.safetensors"]
    assert sorted(remote.files()) == sorted(
        [
            "attempts/000001.json", "config.yaml", "data.digest", "environment.json",
            "eval/step-00000003.json", "metrics.jsonl", "tokenizer.json",
            *(f"checkpoints/step-00000003/{name}" for name in names),
        ]
    )  # fmt: skip
    manifest = json.loads(remote.read("checkpoints/step-00000003/manifest.json") or "")
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    copied = remote.files("checkpoints/step-00000003")
    assert {name: copied[name].bytes for name in sizes} == sizes
    assert remote.steps() == [3]
    assert not copy_checkpoint(remote, run, 3, 1)  # copied before


@pytest.mark.slow
def test_manifest_is_written_last_and_removed_first(
    s3: RemoteRun, run: RunFolder, server: FailingServer
) -> None:
    copy(s3, run, 3)
    written = [path_in_checkpoints(r.path) for r in server.requests if r.method == "PUT"]
    files = [path for path in written if path.startswith("step-")]
    assert len(files) == 4
    assert written[-1] == "step-00000003/manifest.json"
    copy(s3, run, 6)
    server.requests.clear()
    retain_copies(s3, run, 6, 1, KEEP_ONE)
    removed = [path_in_checkpoints(r.path) for r in server.requests if r.method == "DELETE"]
    assert removed[0] == "step-00000003/manifest.json"
    assert len(removed) == 4
    assert s3.steps() == [6]


def test_retention_applies_to_copies(disk: RemoteRun, run: RunFolder) -> None:
    for step in (2, 3, 4, 5, 8):
        copy(disk, run, step)
    disk.write(run.tokenizer, "checkpoints/step-00000001/towers.safetensors")  # an unfinished copy
    retain_copies(disk, run, 5, 1, CheckpointSettings(keep=2, keep_every=3))
    assert disk.steps() == [3, 4, 5, 8]  # 8 is later than the newest step
    assert not [name for name in disk.files() if "step-00000001" in name]


@pytest.mark.slow
def test_upload_retries_after_mid_copy_errors(
    s3: RemoteRun, run: RunFolder, server: FailingServer, copiers: list[Copier]
) -> None:
    save(run, 3)
    server.status(503, method="PUT", path="*moments*", times=1)
    server.hang_up(method="PUT", path="*towers*", times=2)  # written, but the response is lost
    copiers.append(copier := Copier(s3, run, 1, KEEP_NINE))
    copier.offer(3)
    copier.wait(lambda: None)
    assert s3.steps() == [3]
    metrics = copier.metrics()
    assert metrics.pop("checkpoint/copy_s") > 0
    assert metrics == {"checkpoint/copy_failures": 0.0, "checkpoint/copied_step": 3}


@pytest.mark.slow
def test_failed_copy_is_logged_and_next_checkpoint_is_copied(
    s3: RemoteRun,
    run: RunFolder,
    server: FailingServer,
    copiers: list[Copier],
    log_text: Callable[[], str],
) -> None:
    copiers.append(copier := Copier(s3, run, 1, KEEP_ONE))
    save(run, 3)
    copier.offer(3)
    copier.wait(lambda: None)
    server.status(500, method="PUT", path="*step-00000006/state.json")
    save(run, 6)
    copier.offer(6)
    copier.wait(lambda: None)
    assert copier.metrics()["checkpoint/copy_failures"] == 1
    assert s3.steps() == [3]  # kept, because the newer copy failed
    assert "attempt 2 of 3 failed: HTTP 500" in log_text()
    assert "step-00000006 was NOT COPIED to s3://" in log_text()
    assert "could not be written in 3 attempts" in log_text()
    server.clear_rules()
    save(run, 9)
    copier.offer(9)
    copier.wait(lambda: None)
    assert s3.steps() == [9]
    assert copier.metrics()["checkpoint/copied_step"] == 9
    assert not [name for name in s3.files() if "step-00000006" in name]


@pytest.mark.slow
def test_slow_copy_skips_waiting_checkpoint_and_keeps_files_in_use(
    s3: RemoteRun,
    run: RunFolder,
    server: FailingServer,
    copiers: list[Copier],
    log_text: Callable[[], str],
) -> None:
    release, upload_started = threading.Event(), threading.Event()
    server.before(
        lambda: (upload_started.set(), release.wait(TIMEOUT_S)), method="PUT", path="*1/moments*"
    )
    copiers.append(copier := Copier(s3, run, 1, KEEP_NINE))
    save(run, 1)
    copier.offer(1)
    assert upload_started.wait(TIMEOUT_S)
    try:
        for step in (2, 3):
            save(run, step, settings=KEEP_ONE, busy=frozenset(copier.busy()))
            copier.offer(step)
        assert copier.busy() == {1, 3}
        assert run.steps_saved() == [1, 2, 3]  # 2 was waiting when 3 was written
        save(run, 4, settings=KEEP_ONE, busy=frozenset(copier.busy()))
        assert run.steps_saved() == [1, 3, 4]
    finally:
        release.set()
    copier.wait(lambda: None)
    assert s3.steps() == [1, 3]
    assert log_text().count("is not copied") == 1
    assert "checkpoint step-00000002 is not copied: step-00000003 is newer" in log_text()


def test_superseded_attempt_changes_no_copies(
    disk: RemoteRun,
    run: RunFolder,
    tmp_path: Path,
    copiers: list[Copier],
    log_text: Callable[[], str],
) -> None:
    copy(disk, run, 3)
    later_run = make_run(tmp_path / "b", attempts=2)
    copy(disk, later_run, 3, attempt=2)
    copy(disk, later_run, 6, attempt=2)
    before = disk.files()
    save(run, 9)
    copiers.append(copier := Copier(disk, run, 1, KEEP_ONE))
    copier.offer(9)
    copier.wait(lambda: None)
    assert copier.failures == 1
    assert "a later start of this run copies its checkpoints; attempt 1 stops copying" in log_text()
    with pytest.raises(UploadSuperseded):
        retain_copies(disk, run, 9, 1, KEEP_ONE)
    assert disk.files() == before


def test_two_starts_cannot_register_the_same_attempt(
    disk: RemoteRun, run: RunFolder, tmp_path: Path
) -> None:
    disk.register_attempt(run, 1)
    disk.register_attempt(run, 1)  # as after a lost response
    with pytest.raises(UploadSuperseded):
        disk.register_attempt(make_run(tmp_path / "b"), 1)
    assert disk.read("config.yaml") == "config.yaml of 1"


@pytest.mark.slow
def test_delayed_write_of_earlier_attempt_does_not_change_later_copy(
    s3: RemoteRun,
    run: RunFolder,
    server: FailingServer,
    tmp_path: Path,
    copiers: list[Copier],
) -> None:
    release, upload_started = threading.Event(), threading.Event()
    server.before(
        lambda: (upload_started.set(), release.wait(TIMEOUT_S)),
        method="PUT",
        path="*towers*",
        times=1,
    )
    copiers.append(copier := Copier(s3, run, 1, KEEP_NINE))
    save(run, 3)
    copier.offer(3)
    assert upload_started.wait(TIMEOUT_S)
    try:
        later_run = make_run(tmp_path / "b", attempts=2)
        copy(s3, later_run, 3, attempt=2)
        before = s3.files()
    finally:
        release.set()
    copier.wait(lambda: None)
    assert copier.failures == 1
    assert s3.files() == before  # sizes and versions
    assert json.loads(s3.read("checkpoints/step-00000003/state.json") or "")["by"] == 2


def test_copy_replaces_all_files_of_an_earlier_attempt(disk: RemoteRun, tmp_path: Path) -> None:
    copy(disk, make_run(tmp_path / "a"), 3)
    disk.write(tmp_path / "a" / "config.yaml", "checkpoints/step-00000003/leftover")
    assert copy(disk, make_run(tmp_path / "b", attempts=2), 3, attempt=2)
    assert json.loads(disk.read("checkpoints/step-00000003/state.json") or "")["by"] == 2
    assert "checkpoints/step-00000003/leftover" not in disk.files()


def test_claim_by_another_run_is_rejected(
    remote: RemoteRun, run: RunFolder, tmp_path: Path
) -> None:
    remote.claim(run)
    remote.claim(run)
    with pytest.raises(GigabatchError, match=r"checkpoint.copy_to: .* belongs to a different run"):
        remote.claim(make_run(tmp_path / "b", started=2))


def test_write_respects_new_and_check_writable_names_the_folder(
    remote: RemoteRun, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    write(path, f"{remote.url}/x", new=True, retry=QUICK_RETRY)
    path.write_text("two")
    with pytest.raises(FileTaken):
        write(path, f"{remote.url}/x", new=True, retry=QUICK_RETRY)
    assert remote.read("x") == "one"
    write(path, f"{remote.url}/x", retry=QUICK_RETRY)
    assert remote.read("x") == "two"
    check_writable(remote.url)
    assert sorted(remote.files()) == ["x"]
    unwritable = "s3://no-such-bucket/x" if remote.url.startswith("s3") else "file:///proc/missing"
    with pytest.raises(GigabatchError, match=rf"{unwritable}/\.probe-.* cannot be written"):
        check_writable(unwritable, QUICK_RETRY)
