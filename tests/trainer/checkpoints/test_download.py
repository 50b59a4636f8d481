"""Downloads of copies: newest valid checkpoint, damaged copies, complete run folders."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from support_copies import copy, make_run, save

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.access import Retry
from gigabatch.trainer.checkpoints.download import (
    fetch_newer_checkpoint,
    fetch_run,
    open_remote_run,
    read_copied_config,
    warn_if_copy_is_newer,
)
from gigabatch.trainer.checkpoints.format import latest_checkpoint
from gigabatch.trainer.checkpoints.remote import RemoteRun
from gigabatch.trainer.run.folder import RunFolder


@pytest.fixture
def remote_folder(tmp_path: Path) -> Path:
    return tmp_path / "remote" / "a"


@pytest.fixture
def remote(remote_folder: Path) -> RemoteRun:
    """Return copies of steps 3, 6 and 9 of a run."""
    run = make_run(remote_folder.parent.parent / "a")
    run.metrics.write_text('{"step": 9}\n')
    run.write_evaluation(3, {"eval/val/mean_recall@10": 0.5})
    remote = RemoteRun(f"file://{remote_folder}", Retry(attempts=1))
    remote.claim(run)
    for step in (3, 6, 9):
        copy(remote, run, step)
    return remote


@pytest.fixture
def target(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "elsewhere" / "runs" / "a")


def newest_valid_step(run: RunFolder) -> int:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint.tensors("towers")["w"].tolist() == [float(checkpoint.step)] * 100
    return checkpoint.step


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_fetched_run_has_all_files_to_resume(
    remote: RemoteRun, target: RunFolder, tmp_path: Path
) -> None:
    fetch_run(remote, target)
    assert newest_valid_step(target) == 9
    assert target.steps_saved() == [9]
    for name in ("config.yaml", "environment.json", "tokenizer.json", "data.digest"):
        assert (target.path / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert target.evaluation(3) == {"eval/val/mean_recall@10": 0.5}
    assert target.metrics.read_text() == '{"step": 9}\n'
    assert [path.name for path in target.path.parent.iterdir()] == ["a"]
    assert read_copied_config(remote) == "config.yaml of 1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: flip_last_bit(f / "towers.safetensors"),
            "towers.safetensors does not match its checksum",
        ),
        (lambda f: (f / "moments.safetensors").unlink(), "moments.safetensors is missing"),
        (lambda f: (f / "state.json").write_text(""), "state.json is 0 bytes, not"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (
            lambda f: add_outside_file(f / "manifest.json"),
            "'../../config.yaml', outside its folder",
        ),
    ],
)
def test_damaged_copy_is_skipped_with_warning(
    damage: object, message: str, remote: RemoteRun, remote_folder: Path, target: RunFolder,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert callable(damage)
    damage(remote_folder / "checkpoints" / "step-00000009")
    fetch_run(remote, target)
    assert newest_valid_step(target) == 6
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "skipping damaged copy: " in warning.getMessage()
    assert f"{remote.url}/checkpoints/step-00000009/" in warning.getMessage()
    assert message in warning.getMessage()
    assert not list(target.checkpoints.glob(".*"))


def add_outside_file(manifest: Path) -> None:
    content = json.loads(manifest.read_text())
    content["files"]["../../config.yaml"] = content["files"]["state.json"]
    manifest.write_text(json.dumps(content))


def test_copy_without_manifest_is_ignored(
    remote: RemoteRun, remote_folder: Path, target: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    (remote_folder / "checkpoints" / "step-00000009" / "manifest.json").unlink()
    fetch_run(remote, target)
    assert newest_valid_step(target) == 6
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_fetch_fails_if_all_copies_are_damaged(
    remote: RemoteRun, remote_folder: Path, target: RunFolder
) -> None:
    for folder in (remote_folder / "checkpoints").iterdir():
        flip_last_bit(folder / "towers.safetensors")
    with pytest.raises(
        GigabatchError, match=r"no valid checkpoint .* \(steps of finished copies: 3, 6, 9\)"
    ):
        fetch_run(remote, target)
    assert not target.path.exists()


def test_fetch_replaces_files_of_a_killed_fetch(remote: RemoteRun, target: RunFolder) -> None:
    partial_folder = target.path.with_name(".a.fetch") / "checkpoints" / ".step-00000009.fetch.tmp"
    partial_folder.mkdir(parents=True)
    (partial_folder / "towers.safetensors").write_text("partial")
    fetch_run(remote, target)
    assert newest_valid_step(target) == 9
    assert not list(target.checkpoints.glob(".*"))


def test_fetch_names_missing_files_and_existing_folder(
    remote: RemoteRun, remote_folder: Path, target: RunFolder
) -> None:
    target.path.mkdir(parents=True)
    with pytest.raises(GigabatchError, match="exists but is not a run folder"):
        fetch_run(remote, target)
    target.path.rmdir()
    (remote_folder / "tokenizer.json").unlink()
    with pytest.raises(GigabatchError, match=r"tokenizer.json missing from the copies"):
        fetch_run(remote, target)
    with pytest.raises(GigabatchError, match="not a copy of a run"):
        read_copied_config(open_remote_run(f"file://{remote_folder}x/"))


def test_newer_copy_is_reported_and_fetched(
    remote: RemoteRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path / "a")
    flip_last_bit(run.checkpoints / "step-00000009" / "towers.safetensors")
    warn_if_copy_is_newer(remote, run, 6)
    assert "has a newer checkpoint, of step 9; resuming from step 6" in caplog.text
    assert f"gigabatch resume {remote.url}" in caplog.text
    fetch_newer_checkpoint(remote, run)
    assert newest_valid_step(run) == 9
    save(run, 12)
    fetch_newer_checkpoint(remote, run)
    assert newest_valid_step(run) == 12
    caplog.clear()
    warn_if_copy_is_newer(remote, run, 12)
    assert caplog.text == ""
    shutil.rmtree(run.checkpoints)
    fetch_newer_checkpoint(remote, run)
    assert run.steps_saved() == [9]


def test_copies_of_another_run_are_rejected(remote: RemoteRun, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", started=2)
    with pytest.raises(GigabatchError, match="belongs to a different run"):
        fetch_newer_checkpoint(remote, other)
    assert other.steps_saved() == []


def test_next_attempt_is_higher_than_copied_attempts(remote: RemoteRun, target: RunFolder) -> None:
    fetch_run(remote, target)
    target.reserve_attempts(7, remote.url)
    assert target.owned_by(7)
    assert not target.owned_by(6)
    assert len(list((target.path / "attempts").iterdir())) == 7
