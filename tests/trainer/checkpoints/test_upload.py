"""Copies of checkpoints on a real S3 server that fails, and on a disk: whole or absent, fenced."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from remote_folder import NUMBERS
from servers import FailingServer, make_bucket, s3_server
from support_copies import MANY, copy, make_run, save

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.access import FileTaken, Retry, check_writable, write
from gigabatch.trainer.checkpoints.remote import Overtaken, RemoteRun
from gigabatch.trainer.checkpoints.upload import Copier, copy_checkpoint, retain_copies
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.folder import RunFolder

QUICK = Retry(attempts=3, first_wait_s=0.01, timeout_s=20)
ONE = CheckpointSettings(keep=1)
PATIENCE = 30.0  # seconds in which anything here is long done


@pytest.fixture(scope="module")
def server() -> Iterator[FailingServer]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server: FailingServer) -> RemoteRun:
    """An empty place on S3, whose first client is made."""
    bucket = f"copies-{next(NUMBERS)}"
    server.clear_rules()
    make_bucket(server, bucket)
    place = RemoteRun(f"s3://{bucket}/far/a", QUICK)
    assert place.files() == {}
    server.requests.clear()
    return place


@pytest.fixture
def disk(tmp_path: Path) -> RemoteRun:
    return RemoteRun(f"file://{tmp_path}/far/a", QUICK)


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest) -> RemoteRun:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, RemoteRun)
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "a")


def step_of(path: str) -> str:
    return path.partition("checkpoints/")[2]


@pytest.fixture
def copiers() -> Iterator[list[Copier]]:
    """Copiers that are awaited when the test ends."""
    made: list[Copier] = []
    yield made
    for copier in made:
        copier.wait(lambda: None)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, "gigabatch")
    return lambda: "\n".join(caplog.messages)


def test_a_copy_is_the_same_files_and_what_a_run_needs(place: RemoteRun, run: RunFolder) -> None:
    run.metrics.write_text('{"step": 1}\n')
    run.write_evaluation(3, {"eval/val/mean_recall@10": 0.5})
    place.claim(run)
    assert copy(place, run, 3)
    names = ["manifest.json", "moments.safetensors", "state.json", "towers.safetensors"]
    assert sorted(place.files()) == sorted(
        [
            "attempts/000001.json", "config.yaml", "data.digest", "environment.json",
            "eval/step-00000003.json", "metrics.jsonl", "tokenizer.json",
            *(f"checkpoints/step-00000003/{name}" for name in names),
        ]
    )  # fmt: skip
    manifest = json.loads(place.read("checkpoints/step-00000003/manifest.json") or "")
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    there = place.files("checkpoints/step-00000003")
    assert {name: there[name].bytes for name in sizes} == sizes
    assert place.steps() == [3]
    assert not copy_checkpoint(place, run, 3, 1)  # it is there


@pytest.mark.slow
def test_the_manifest_is_written_last_and_removed_first(
    s3: RemoteRun, run: RunFolder, server: FailingServer
) -> None:
    copy(s3, run, 3)
    written = [step_of(r.path) for r in server.requests if r.method == "PUT"]
    files = [path for path in written if path.startswith("step-")]
    assert len(files) == 4
    assert written[-1] == "step-00000003/manifest.json"
    copy(s3, run, 6)
    server.requests.clear()
    retain_copies(s3, run, 6, 1, ONE)
    removed = [step_of(r.path) for r in server.requests if r.method == "DELETE"]
    assert removed[0] == "step-00000003/manifest.json"
    assert len(removed) == 4
    assert s3.steps() == [6]


def test_retention_holds_there_too(disk: RemoteRun, run: RunFolder) -> None:
    for step in (2, 3, 4, 5, 8):
        copy(disk, run, step)
    disk.write(run.tokenizer, "checkpoints/step-00000001/towers.safetensors")  # a copy cut off
    retain_copies(disk, run, 5, 1, CheckpointSettings(keep=2, keep_every=3))
    assert disk.steps() == [3, 4, 5, 8]  # 8: this run goes on from before it
    assert not [name for name in disk.files() if "step-00000001" in name]


@pytest.mark.slow
def test_errors_in_mid_copy_are_borne(
    s3: RemoteRun, run: RunFolder, server: FailingServer, copiers: list[Copier]
) -> None:
    save(run, 3)
    server.status(503, method="PUT", path="*moments*", times=1)
    server.hang_up(method="PUT", path="*towers*", times=2)  # the answer is lost: it was written
    copiers.append(copier := Copier(s3, run, 1, MANY))
    copier.offer(3)
    copier.wait(lambda: None)
    assert s3.steps() == [3]
    metrics = copier.metrics()
    assert metrics.pop("checkpoint/copy_s") > 0
    assert metrics == {"checkpoint/copy_failures": 0.0, "checkpoint/copied_step": 3}


@pytest.mark.slow
def test_a_copy_that_fails_is_loud_and_the_next_is_tried(
    s3: RemoteRun,
    run: RunFolder,
    server: FailingServer,
    copiers: list[Copier],
    told: Callable[[], str],
) -> None:
    copiers.append(copier := Copier(s3, run, 1, ONE))
    save(run, 3)
    copier.offer(3)
    copier.wait(lambda: None)
    server.status(500, method="PUT", path="*step-00000006/state.json")
    save(run, 6)
    copier.offer(6)
    copier.wait(lambda: None)
    assert copier.metrics()["checkpoint/copy_failures"] == 1
    assert s3.steps() == [3]  # and it was not removed for a newer one that does not stand
    assert "attempt 2 of 3: HTTP 500" in told()
    assert "step-00000006 was NOT COPIED to s3://" in told()
    assert "could not be written in 3 attempts" in told()
    server.clear_rules()
    save(run, 9)
    copier.offer(9)
    copier.wait(lambda: None)
    assert s3.steps() == [9]
    assert copier.metrics()["checkpoint/copied_step"] == 9
    assert not [name for name in s3.files() if "step-00000006" in name]


@pytest.mark.slow
def test_a_slow_copy_passes_over_what_a_newer_one_follows_and_keeps_its_files(
    s3: RemoteRun,
    run: RunFolder,
    server: FailingServer,
    copiers: list[Copier],
    told: Callable[[], str],
) -> None:
    go_on, reached = threading.Event(), threading.Event()
    server.before(lambda: (reached.set(), go_on.wait(PATIENCE)), method="PUT", path="*1/moments*")
    copiers.append(copier := Copier(s3, run, 1, MANY))
    save(run, 1)
    copier.offer(1)
    assert reached.wait(PATIENCE)
    try:
        for step in (2, 3):
            save(run, step, settings=ONE, busy=frozenset(copier.busy()))
            copier.offer(step)
        assert copier.busy() == {1, 3}
        assert run.steps_saved() == [1, 2, 3]  # 2 was waiting when 3 was written
        save(run, 4, settings=ONE, busy=frozenset(copier.busy()))
        assert run.steps_saved() == [1, 3, 4]
    finally:
        go_on.set()
    copier.wait(lambda: None)
    assert s3.steps() == [1, 3]
    assert told().count("is not copied") == 1
    assert "checkpoint step-00000002 is not copied: step-00000003 is newer" in told()


def test_an_attempt_that_was_overtaken_elsewhere_writes_no_more(
    disk: RemoteRun,
    run: RunFolder,
    tmp_path: Path,
    copiers: list[Copier],
    told: Callable[[], str],
) -> None:
    copy(disk, run, 3)
    later = make_run(tmp_path / "b", attempts=2)
    copy(disk, later, 3, attempt=2)
    copy(disk, later, 6, attempt=2)
    before = disk.files()
    save(run, 9)
    copiers.append(copier := Copier(disk, run, 1, ONE))
    copier.offer(9)
    copier.wait(lambda: None)
    assert copier.failures == 1
    assert "a later start of this run copies there now; attempt 1 writes there no more" in told()
    with pytest.raises(Overtaken):
        retain_copies(disk, run, 9, 1, ONE)
    assert disk.files() == before


def test_two_starts_that_took_one_number_do_not_share_it(
    disk: RemoteRun, run: RunFolder, tmp_path: Path
) -> None:
    disk.begin(run, 1)
    disk.begin(run, 1)  # as after a lost answer
    with pytest.raises(Overtaken):
        disk.begin(make_run(tmp_path / "b"), 1)
    assert disk.read("config.yaml") == "config.yaml of 1"


@pytest.mark.slow
def test_a_stalled_write_of_a_cut_off_attempt_cannot_land_on_a_later_copy(
    s3: RemoteRun,
    run: RunFolder,
    server: FailingServer,
    tmp_path: Path,
    copiers: list[Copier],
) -> None:
    go_on, reached = threading.Event(), threading.Event()
    server.before(
        lambda: (reached.set(), go_on.wait(PATIENCE)), method="PUT", path="*towers*", times=1
    )
    copiers.append(copier := Copier(s3, run, 1, MANY))
    save(run, 3)
    copier.offer(3)
    assert reached.wait(PATIENCE)
    try:
        later = make_run(tmp_path / "b", attempts=2)
        copy(s3, later, 3, attempt=2)
        before = s3.files()
    finally:
        go_on.set()
    copier.wait(lambda: None)
    assert copier.failures == 1
    assert s3.files() == before  # versions, too
    assert json.loads(s3.read("checkpoints/step-00000003/state.json") or "")["by"] == 2


def test_a_copy_of_an_attempt_before_is_replaced_whole(disk: RemoteRun, tmp_path: Path) -> None:
    copy(disk, make_run(tmp_path / "a"), 3)
    disk.write(tmp_path / "a" / "config.yaml", "checkpoints/step-00000003/left")
    assert copy(disk, make_run(tmp_path / "b", attempts=2), 3, attempt=2)
    assert json.loads(disk.read("checkpoints/step-00000003/state.json") or "")["by"] == 2
    assert "checkpoints/step-00000003/left" not in disk.files()


def test_a_name_is_claimed_once(place: RemoteRun, run: RunFolder, tmp_path: Path) -> None:
    place.claim(run)
    place.claim(run)
    with pytest.raises(GigabatchError, match=r"checkpoint.copy_to: .* holds another run"):
        place.claim(make_run(tmp_path / "b", started=2))


def test_writing_new_files_and_where_nothing_may_be_written(
    place: RemoteRun, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    write(path, f"{place.url}/x", new=True, retry=QUICK)
    path.write_text("two")
    with pytest.raises(FileTaken):
        write(path, f"{place.url}/x", new=True, retry=QUICK)
    assert place.read("x") == "one"
    write(path, f"{place.url}/x", retry=QUICK)
    assert place.read("x") == "two"
    check_writable(place.url)
    assert sorted(place.files()) == ["x"]
    nowhere = "s3://no-such-bucket/x" if place.url.startswith("s3") else "file:///proc/nowhere"
    with pytest.raises(GigabatchError, match=rf"{nowhere}/\.probe-.* cannot be written"):
        check_writable(nowhere, QUICK)
