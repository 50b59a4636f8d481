"""Checkpoints in our own format: safetensors and json, committed atomically, verified on loading.

A folder is written as `.step-N.ATTEMPT.tmp`, each file synced, given a manifest with sizes and
SHA-256 sums, renamed to `step-N`, and only then named in LATEST. No pickle is ever read. Weights
and moments are stored whole, so any world size and ZeRO stage loads them.
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
from gigabatch.data.files import sync_folder
from gigabatch.trainer.checkpoints.retention import steps_to_keep
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.files import sync_file, to_json, write_atomically
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
FORMAT = 1
PASSING = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM,
    errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
)  # fmt: skip
"""What a disk or a file server may say once, and not again."""
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state`: step, counters and fingerprints."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def has(self, name: str) -> bool:
        """Whether there is such a file of tensors."""
        return (self.path / f"{name}.safetensors").exists()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file: `towers`, `moments`, `objective`, or, where there is one, `ema`.

        Raises GigabatchError where it is anything but safetensors; nothing is ever unpickled.
        """
        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise GigabatchError(
                f"{file}: not a safetensors file ({error}). Restore the checkpoint, or remove its "
                "folder to go on from the one before."
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
    """Write, sync, commit, and remove what need not be kept, but for the steps in `busy`. Called
    on rank 0 alone.

    Where the checkpoint does not stand, earlier ones are untouched. Raises GigabatchError for what
    only the user can mend, such as a full disk; OSError for what may pass, so that the workers
    are started again.
    """
    fresh = run.checkpoints / f".step-{step:08d}.{attempt:06d}.tmp"
    try:
        _remove_left(run, attempt)
        _write(fresh, step, files, state)
        _commit(run, fresh, step, attempt)
    except (OSError, SafetensorError) as error:
        message = (
            f"{run.checkpoints}: the checkpoint of step {step} was not saved: {error}. Earlier "
            "checkpoints are intact"
        )
        if _may_pass(error):
            raise OSError(message + ".") from error
        raise GigabatchError(message + "; make room, then resume.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    try:
        _retain(run, step, attempt, settings, busy)
    except (OSError, ValueError) as error:  # a file held open on NFS, a folder that is a link
        log.warning("%s: an old checkpoint was not removed: %s", run.checkpoints, error)


def _may_pass(error: Exception) -> bool:
    """Whether a disk's fault may be gone when the workers are started again: a server's pause, a
    file handle gone stale; not a full disk or something in the way."""
    if isinstance(error, OSError):
        return error.errno in PASSING
    return any(os.strerror(number) in str(error) for number in PASSING)  # safetensors' words


def _remove_left(run: RunFolder, attempt: int) -> None:
    """What earlier attempts were killed in. First of all: the write may need its room."""
    for left in run.checkpoints.glob(".step-*.tmp"):
        named = re.fullmatch(r"\.step-\d+\.(\d+)\.tmp", left.name)
        if named and int(named[1]) < attempt:
            shutil.rmtree(left, ignore_errors=True)


def _write(folder: Path, step: int, files: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(dict(tensors), folder / f"{name}.safetensors")
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
    _refuse_cut_off(run, attempt)
    final = run.checkpoints / f"step-{step:08d}"
    if final.exists() and fault_in(final):
        shutil.rmtree(final)  # a damaged one of an earlier attempt, already passed over
    if final.exists() and _is_other(final, fresh, attempt):
        final.rename(run.checkpoints / f".{final.name}.{attempt - 1:06d}.tmp")  # swept next time
    if not final.exists():
        fresh.rename(final)
        sync_folder(run.checkpoints)
    write_atomically(run.checkpoints / "LATEST", final.name + "\n")
    if not run.owned_by(attempt):  # this process stood still on the way here
        saved = (run.checkpoints / f"step-{each:08d}" for each in run.steps_saved())
        newest = max(saved, key=lambda path: (_attempt_of(path), path.name))
        write_atomically(run.checkpoints / "LATEST", newest.name + "\n")
        _refuse_cut_off(run, attempt)


def _refuse_cut_off(run: RunFolder, attempt: int) -> None:
    if not run.owned_by(attempt):
        raise OSError(f"attempt {attempt} was cut off and a later one has taken over")


def _is_other(final: Path, fresh: Path, attempt: int) -> bool:
    """Whether a sound checkpoint of an earlier attempt, of the same step, holds other weights: it
    was passed over, and the run took another course. (Equal ones stay as they are.)"""
    old, new = (json.loads((p / "manifest.json").read_text())["files"] for p in (final, fresh))
    weights = "towers.safetensors"
    return _attempt_of(final) < attempt and old.get(weights) != new.get(weights)


def _retain(
    run: RunFolder, newest: int, attempt: int, settings: CheckpointSettings, busy: Set[int]
) -> None:
    """Remove all that `settings` does not keep up to `newest`; what lies beyond it was found
    damaged, or is of a later attempt, which is asked for anew each time: this process may have
    stood still since it committed, or see an older folder."""
    saved = run.steps_saved()
    kept = steps_to_keep(run, [step for step in saved if step <= newest], settings)
    for step in sorted(set(saved) - kept - busy):
        path = run.checkpoints / f"step-{step:08d}"
        if not run.owned_by(attempt) or _attempt_of(path) > attempt:
            return
        shutil.rmtree(path)


def _attempt_of(path: Path) -> int:
    """Which attempt saved it; 0 where that cannot be read."""
    try:
        return int(json.loads((path / "state.json").read_text())["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def latest_checkpoint(run: RunFolder) -> Checkpoint | None:
    """The newest sound checkpoint; None where none was ever saved.

    Passes over damaged ones with a warning. Raises GigabatchError where all are damaged: a fresh
    start must be asked for, never fallen into.
    """
    faults = []
    for step in reversed(run.steps_saved()):
        path = run.checkpoints / f"step-{step:08d}"
        fault = fault_in(path)
        if not fault:
            state = json.loads((path / "state.json").read_text())
            return Checkpoint(path, step, state)
        log.warning("checkpoint passed over: %s", fault)
        faults.append(fault)
    if faults:
        raise GigabatchError(
            f"{run.checkpoints}: no checkpoint can be loaded: {'; '.join(faults)}. Restore one, or "
            "start a new run."
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, verified. Raises GigabatchError where it is damaged."""
    fault = fault_in(path)
    if fault:
        raise GigabatchError(f"{fault}. Take another checkpoint.")
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(path, state["step"], state)


def checkpoint_at(run: RunFolder, step: int) -> Checkpoint:
    """The checkpoint of one step, verified by another rank."""
    path = run.checkpoints / f"step-{step:08d}"
    return Checkpoint(path, step, json.loads((path / "state.json").read_text()))


def fault_in(path: Path) -> str:
    """What is wrong with a checkpoint folder; empty if nothing is."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise GigabatchError(
                f"{path}: it has format {manifest['format']}, this version reads {FORMAT}. Go on "
                "with the version that wrote it."
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
