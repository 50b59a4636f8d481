"""The checkpoint format: safetensors and JSON, committed atomically, verified on loading.

A checkpoint is written to `.step-N.ATTEMPT.tmp`: every file is synced, then a manifest with sizes
and SHA-256 checksums is added, then the folder is renamed to `step-N` and named in LATEST. Pickles
are never read. Weights and moments are stored complete, so they can be loaded at any world size and
ZeRO stage.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.files import sync_folder, with_umask_mode
from gigabatch.trainer.checkpoints.retention import steps_to_keep
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.files import sync_file, to_json, write_atomically
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
FORMAT = 1
TRANSIENT_ERRORS = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM,
    errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
)  # fmt: skip
"""Disk and file-server errors that may not recur on a retry."""
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: Its folder.
        step: Steps trained before it.
        state: Contents of state.json: step, counters and fingerprints.
    """

    path: Path
    step: int
    state: Mapping[str, Any]

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has the file NAME.safetensors."""
        return (self.path / f"{name}.safetensors").exists()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Load one file: `towers`, `moments`, `objective`, or `ema` if the run averages weights.

        Raises:
            GigabatchError: if it is not a safetensors file; pickles are never read.
        """
        file = self.path / f"{name}.safetensors"
        try:
            tensors: dict[str, Tensor] = load_file(file)
            return tensors
        except (OSError, SafetensorError) as error:
            raise GigabatchError(
                f"{file}: not a safetensors file ({error}). Restore the checkpoint, or delete its "
                "folder to resume from the one before."
            ) from error


def write_checkpoint(
    run: RunFolder,
    attempt: int,
    step: int,
    files: Mapping[str, Tensors],
    state: Mapping[str, Any],
    settings: CheckpointSettings,
    busy: Set[int] = frozenset(),
) -> None:
    """Write, sync and commit a checkpoint, then remove old ones. Called on rank 0 only.

    If it fails, earlier checkpoints are untouched.

    Args:
        run: The run.
        attempt: Number of this attempt.
        step: Steps trained so far.
        files: File name without suffix -> its tensors.
        state: Contents of state.json.
        settings: Which checkpoints to keep.
        busy: Steps whose checkpoints must not be removed yet.

    Raises:
        GigabatchError: for errors that only the user can fix, such as a full disk.
        OSError: for transient errors, so that the launcher restarts the workers.
    """
    fresh = run.checkpoints / f".step-{step:08d}.{attempt:06d}.tmp"
    try:
        _remove_leftovers(run, attempt)
        _write(fresh, step, files, state)
        _commit(run, fresh, step, attempt)
    except (OSError, SafetensorError) as error:
        message = (
            f"{run.checkpoints}: the checkpoint of step {step} was not saved: {error}. Earlier "
            "checkpoints are intact."
        )
        if _is_transient(error):
            raise OSError(message) from error
        raise GigabatchError(f"{message} Free disk space, then resume.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    try:
        _remove_old(run, step, attempt, settings, busy)
    except (OSError, ValueError) as error:  # NFS keeps open files; the folder may be a link.
        log.warning("%s: an old checkpoint was not removed: %s", run.checkpoints, error)


def _is_transient(error: Exception) -> bool:
    """Return whether a restart may succeed, as after a server's pause; not so on a full disk."""
    if isinstance(error, OSError):
        return error.errno in TRANSIENT_ERRORS
    # A SafetensorError has no errno, only the system's message.
    return any(os.strerror(number) in str(error) for number in TRANSIENT_ERRORS)


def _remove_leftovers(run: RunFolder, attempt: int) -> None:
    """Remove unfinished writes of earlier attempts; the next write may need their space."""
    for folder in run.checkpoints.glob(".step-*.tmp"):
        match = re.fullmatch(r"\.step-\d+\.(\d+)\.tmp", folder.name)
        if match and int(match[1]) < attempt:
            shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, step: int, files: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, tensors in files.items():
        path = folder / f"{name}.safetensors"
        with with_umask_mode(path):
            save_file(dict(tensors), path)
    (folder / "state.json").write_text(to_json(state))
    entries = {}
    for path in sorted(folder.iterdir()):
        sync_file(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "step": step, "files": entries}
    (folder / "manifest.json").write_text(to_json(manifest))
    sync_file(folder / "manifest.json")
    sync_folder(folder)


def _commit(run: RunFolder, fresh: Path, step: int, attempt: int) -> None:
    """Rename a written folder to its final name and point LATEST at it."""
    _check_not_superseded(run, attempt)
    final = run.checkpoints / f"step-{step:08d}"
    if final.exists() and damage_in(final):
        shutil.rmtree(final)  # It is from an earlier attempt, and loading has skipped it.
    if final.exists() and _has_other_weights(final, fresh, attempt):
        # The next write removes folders with such a name as leftovers.
        final.rename(run.checkpoints / f".{final.name}.{attempt - 1:06d}.tmp")
    if not final.exists():
        fresh.rename(final)
        sync_folder(run.checkpoints)
    write_atomically(run.checkpoints / "LATEST", final.name + "\n")
    if not run.owned_by(attempt):
        # This process was suspended, and a later attempt has started: undo the change of LATEST.
        saved = (run.checkpoints / f"step-{number:08d}" for number in run.steps_saved())
        newest = max(saved, key=lambda path: (_attempt_of(path), path.name))
        write_atomically(run.checkpoints / "LATEST", newest.name + "\n")
        _check_not_superseded(run, attempt)


def _check_not_superseded(run: RunFolder, attempt: int) -> None:
    if not run.owned_by(attempt):
        raise OSError(f"attempt {attempt} was superseded by a later one")


def _has_other_weights(final: Path, fresh: Path, attempt: int) -> bool:
    """Return whether an earlier attempt's checkpoint of the same step has different weights.

    This happens if the resumed run skipped that checkpoint and then trained differently. Equal
    checkpoints are not replaced.
    """
    old, new = (json.loads((p / "manifest.json").read_text())["files"] for p in (final, fresh))
    weights = "towers.safetensors"
    return _attempt_of(final) < attempt and bool(old.get(weights) != new.get(weights))


def _remove_old(
    run: RunFolder, newest: int, attempt: int, settings: CheckpointSettings, busy: Set[int]
) -> None:
    """Remove the checkpoints that `settings` does not keep.

    Checkpoints after `newest` are damaged, or belong to a later attempt. The attempt is checked
    before each removal, because this process may have been suspended since its commit, or may see
    an outdated folder.
    """
    saved = run.steps_saved()
    kept = steps_to_keep(run, [step for step in saved if step <= newest], settings)
    for step in sorted(set(saved) - kept - busy):
        path = run.checkpoints / f"step-{step:08d}"
        if not run.owned_by(attempt) or _attempt_of(path) > attempt:
            return
        shutil.rmtree(path)


def _attempt_of(path: Path) -> int:
    """Return the number of the attempt that saved a checkpoint; 0 if unreadable."""
    try:
        return int(json.loads((path / "state.json").read_text())["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def latest_checkpoint(run: RunFolder) -> Checkpoint | None:
    """Return the newest valid checkpoint, or None if none was ever saved.

    Damaged checkpoints are skipped with a warning.

    Raises:
        GigabatchError: if all are damaged. A run never restarts from step 1 by itself.
    """
    problems = []
    for step in reversed(run.steps_saved()):
        path = run.checkpoints / f"step-{step:08d}"
        damage = damage_in(path)
        if not damage:
            state = json.loads((path / "state.json").read_text())
            return Checkpoint(path, step, state)
        log.warning("skipping damaged checkpoint: %s", damage)
        problems.append(damage)
    if problems:
        raise GigabatchError(
            f"{run.checkpoints}: no checkpoint can be loaded: {'; '.join(problems)}. Restore one, "
            "or start a new run."
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open and verify the checkpoint in a folder.

    Raises:
        GigabatchError: if it is damaged.
    """
    damage = damage_in(path)
    if damage:
        raise GigabatchError(f"{damage}. Use a different checkpoint.")
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(path, state["step"], state)


def checkpoint_at(run: RunFolder, step: int) -> Checkpoint:
    """Open the checkpoint of a step that another rank has verified."""
    path = run.checkpoints / f"step-{step:08d}"
    return Checkpoint(path, step, json.loads((path / "state.json").read_text()))


def damage_in(path: Path) -> str:
    """Return what is wrong with a checkpoint folder; empty if it is valid.

    Raises:
        GigabatchError: if a version of this package with a different format wrote it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise GigabatchError(
                f"{path}: its format is {manifest['format']}, but this version reads {FORMAT}. "
                "Resume with the version that wrote it."
            )
        for name, entry in manifest["files"].items():
            file = path / name
            if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
                return f"{file} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is incomplete ({type(error).__name__}: {error})"
    return ""


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
