"""The checkpoint format: atomic commits, verification, damage."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints import format as checkpoint
from gigabatch.trainer.checkpoints.format import (
    _is_transient,
    _remove_old,
    latest_checkpoint,
    write_checkpoint,
)
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "000001.json").touch()
    return RunFolder(tmp_path)


def save(run: RunFolder, step: int, attempt: int = 1, keep: int = 10) -> None:
    files = {"towers": {"w": torch.full((3,), float(step))}, "moments": {"m": torch.ones(2)}}
    settings = CheckpointSettings(keep=keep)
    state = {"step": step, "data": "x", "attempt": attempt}
    write_checkpoint(run, attempt, step, files, state, settings)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_saved_checkpoint_is_loaded(run: RunFolder) -> None:
    save(run, 7)
    newest = latest_checkpoint(run)
    assert newest is not None
    assert (newest.step, newest.state["data"]) == (7, "x")
    assert torch.equal(newest.tensors("towers")["w"], torch.full((3,), 7.0))
    assert (run.checkpoints / "LATEST").read_text() == "step-00000007\n"


def test_latest_checkpoint_of_a_new_run_is_none(run: RunFolder) -> None:
    assert latest_checkpoint(run) is None


def test_only_the_newest_checkpoints_are_kept(run: RunFolder) -> None:
    for step in (1, 2, 3, 4):
        save(run, step, keep=2)
    assert run.steps_saved() == [3, 4]


@pytest.mark.parametrize("name", ["towers.safetensors", "state.json", "manifest.json"])
def test_flipped_byte_falls_back_with_a_warning(
    name: str, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1)
    save(run, 2)
    path = run.checkpoints / "step-00000002" / name
    flip_byte(path) if name != "manifest.json" else path.write_text("{")
    with caplog.at_level(logging.WARNING, logger="gigabatch"):
        newest = latest_checkpoint(run)
    assert newest is not None
    assert newest.step == 1
    assert "step-00000002" in caplog.text


def test_missing_file_falls_back(run: RunFolder) -> None:
    save(run, 1)
    save(run, 2)
    (run.checkpoints / "step-00000002" / "moments.safetensors").unlink()
    assert latest_checkpoint(run).step == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("content", ["", "step-000", "step-99999999\n"])
def test_damaged_latest_file_is_ignored(content: str, run: RunFolder) -> None:
    save(run, 3)
    (run.checkpoints / "LATEST").write_text(content)
    assert latest_checkpoint(run).step == 3  # type: ignore[union-attr]


def test_suspended_process_does_not_reset_latest(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_atomically

    def write_after_later_attempt(path: Path, text: str) -> None:
        monkeypatch.setattr(checkpoint, "write_atomically", write)
        (run.path / "attempts" / "000002.json").touch()
        save(run, 9, attempt=2)
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_atomically", write_after_later_attempt)
    with pytest.raises((GigabatchError, OSError), match="superseded by a later one"):
        save(run, 3)
    assert (run.checkpoints / "LATEST").read_text() == "step-00000009\n"
    assert run.steps_saved() == [3, 9]


def save_and_die_before_latest(run: RunFolder, step: int) -> None:
    checkpoint.write_atomically = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    save(run, step)


def test_kill_between_rename_and_latest_keeps_both_checkpoints(run: RunFolder) -> None:
    save(run, 1)
    process = multiprocessing.get_context("fork").Process(
        target=save_and_die_before_latest, args=(run, 2)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (run.checkpoints / "LATEST").read_text() == "step-00000001\n"
    assert run.steps_saved() == [1, 2]
    newest = latest_checkpoint(run)
    assert newest is not None
    assert torch.equal(newest.tensors("towers")["w"], torch.full((3,), 2.0))
    save(run, 3)
    assert (run.checkpoints / "LATEST").read_text() == "step-00000003\n"
    assert run.steps_saved() == [1, 2, 3]


def test_loading_fails_if_all_checkpoints_are_damaged(run: RunFolder) -> None:
    for step in (1, 2):
        save(run, step)
        flip_byte(run.checkpoints / f"step-{step:08d}" / "towers.safetensors")
    with pytest.raises(GigabatchError, match="no checkpoint can be loaded"):
        latest_checkpoint(run)


def test_partly_written_folder_is_not_a_checkpoint(run: RunFolder) -> None:
    save(run, 1)
    (run.checkpoints / ".step-00000002.000001.tmp").mkdir()
    assert run.steps_saved() == [1]
    (run.path / "attempts" / "000002.json").touch()
    save(run, 2, attempt=2)
    assert run.steps_saved() == [1, 2]
    assert not list(run.checkpoints.glob(".*"))


def test_failed_write_keeps_earlier_checkpoints(run: RunFolder) -> None:
    save(run, 1)
    # A file in place of the temporary folder makes the write fail, as a full disk would.
    (run.checkpoints / ".step-00000002.000001.tmp").write_text("not a folder")
    with pytest.raises(GigabatchError, match="step 2 was not saved"):
        save(run, 2)
    assert latest_checkpoint(run).step == 1  # type: ignore[union-attr]


def test_superseded_worker_cannot_commit(run: RunFolder) -> None:
    save(run, 1)
    (run.path / "attempts" / "000002.json").touch()
    with pytest.raises(GigabatchError, match="superseded by a later one"):
        save(run, 2, attempt=1)
    assert run.steps_saved() == [1]
    assert not list(run.checkpoints.glob(".*"))


def test_worker_superseded_after_its_commit_removes_nothing(run: RunFolder) -> None:
    save(run, 1)
    (run.path / "attempts" / "000002.json").touch()
    save(run, 5, attempt=2)
    _remove_old(run, 1, 1, CheckpointSettings(keep=1), set())
    assert run.steps_saved() == [1, 5]
    (run.path / "attempts" / "000002.json").unlink()  # as if a network file system hid it
    _remove_old(run, 1, 1, CheckpointSettings(keep=1), set())
    assert run.steps_saved() == [1, 5]


def test_leftovers_of_a_kill_are_removed_before_the_next_write(run: RunFolder) -> None:
    leftover = run.checkpoints / ".step-00000001.000001.tmp"
    leftover.mkdir(parents=True)
    (run.path / "attempts" / "000002.json").touch()
    (run.checkpoints / ".step-00000002.000002.tmp").write_text("not a folder")
    with pytest.raises(GigabatchError, match="step 2 was not saved"):
        save(run, 2, attempt=2)
    assert not leftover.exists()


def test_failed_removal_of_an_old_checkpoint_is_a_warning(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1)
    old = run.checkpoints / "step-00000001"
    old.rename(tmp_path / "elsewhere")
    old.symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING, logger="gigabatch"):
        save(run, 2, keep=1)
    assert "an old checkpoint was not removed" in caplog.text
    assert latest_checkpoint(run).step == 2  # type: ignore[union-attr]


def test_valid_checkpoint_is_never_overwritten(run: RunFolder) -> None:
    save(run, 1)
    path = run.checkpoints / "step-00000001" / "towers.safetensors"
    before = os.stat(path).st_ino
    save(run, 1)
    assert os.stat(path).st_ino == before


def test_damaged_checkpoint_is_replaced(run: RunFolder) -> None:
    save(run, 1)
    flip_byte(run.checkpoints / "step-00000001" / "towers.safetensors")
    save(run, 1)
    assert latest_checkpoint(run).step == 1  # type: ignore[union-attr]


def test_damaged_newer_checkpoint_does_not_displace_valid_ones(run: RunFolder) -> None:
    save(run, 100)
    save(run, 200)
    flip_byte(run.checkpoints / "step-00000200" / "towers.safetensors")
    save(run, 150, keep=1)
    assert run.steps_saved() == [150]
    assert latest_checkpoint(run).step == 150  # type: ignore[union-attr]


def test_checkpoint_of_another_format_raises(run: RunFolder) -> None:
    save(run, 1)
    manifest = run.checkpoints / "step-00000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(GigabatchError, match="its format is 9"):
        latest_checkpoint(run)


def test_manifest_lists_every_file(run: RunFolder) -> None:
    save(run, 5)
    folder = run.checkpoints / "step-00000005"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert load_file(folder / "towers.safetensors").keys() == {"w"}


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickle_in_place_of_tensors_raises_without_being_loaded(
    run: RunFolder, tmp_path: Path
) -> None:
    save(run, 1)
    folder = run.checkpoints / "step-00000001"
    file, evidence = folder / "towers.safetensors", tmp_path / "unpickled"
    file.write_bytes(pickle.dumps(_Payload(evidence)))
    manifest = json.loads((folder / "manifest.json").read_text())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    newest = latest_checkpoint(run)
    assert newest is not None
    with pytest.raises(GigabatchError, match="not a safetensors file"):
        newest.tensors("towers")
    assert not evidence.exists()


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EACCES, "Permission denied"), False),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), False),
        (SafetensorError("I/O error: Input/output error (os error 5)"), True),
    ],
)
def test_transient_errors_are_recognized(error: Exception, transient: bool) -> None:
    assert _is_transient(error) is transient


def test_checkpoint_with_other_weights_of_an_earlier_attempt_is_replaced(run: RunFolder) -> None:
    save(run, 1)
    (run.path / "attempts" / "000002.json").touch()
    files = {"towers": {"w": torch.zeros(3)}, "moments": {"m": torch.ones(2)}}
    state = {"step": 1, "data": "x", "attempt": 2}
    write_checkpoint(run, 2, 1, files, state, CheckpointSettings())
    newest = latest_checkpoint(run)
    assert newest is not None
    assert newest.tensors("towers")["w"].tolist() == [0, 0, 0]
    assert [path.name for path in run.checkpoints.glob(".*")] == [".step-00000001.000001.tmp"]
    save(run, 2, attempt=2)
    assert not list(run.checkpoints.glob(".*"))
