"""Upload of committed checkpoints to `checkpoint.copy_to`, in a thread that no step waits for.

One checkpoint is copied at a time, and one may wait. A newer checkpoint replaces the waiting one,
and a warning names the replaced one. Files are created, never overwritten, so that a delayed write
of an earlier attempt cannot change a later attempt's copy. The manifest is written last.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.access import FileTaken, Retry
from gigabatch.trainer.checkpoints.remote import RemoteRun, UploadSuperseded
from gigabatch.trainer.checkpoints.retention import steps_to_keep
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
UPLOAD_RETRY = Retry(attempts=7, first_wait_s=1.0)
"""Retries of each request; enough for an outage of one to two minutes."""


def copy_checkpoint(remote: RemoteRun, run: RunFolder, step: int, attempt: int) -> bool:
    """Copy a checkpoint, its metrics and its evaluations; replace an older copy of the same step.

    Args:
        remote: Copies of the run.
        run: Run folder.
        step: Step of a committed checkpoint.
        attempt: Number of this attempt, registered with `remote`.

    Returns:
        False if this checkpoint had been copied before, else True.

    Raises:
        UploadSuperseded: if a later attempt has started.
        GigabatchError: if the copy cannot be written or has other files than the checkpoint.
        OSError: if the checkpoint cannot be read.
    """
    remote.check_not_superseded(run, attempt)
    folder = f"checkpoints/step-{step:08d}"
    manifest = run.path / folder / "manifest.json"
    text = manifest.read_text()
    _write_metrics(remote, run)
    if remote.read(f"{folder}/manifest.json") == text:
        return False
    _remove(remote, run, attempt, folder, list(remote.files(folder)))
    sizes = {name: entry["bytes"] for name, entry in json.loads(text)["files"].items()}
    for name in sizes:
        _write_new(remote, run, attempt, run.path / folder / name)
    copied_sizes = {name: state.bytes for name, state in remote.files(folder).items()}
    if copied_sizes != sizes:
        raise GigabatchError(
            f"{remote.url}/{folder}: expected files of these bytes: {sizes}; it contains: "
            f"{copied_sizes}. Stop other programs that write to this folder."
        )
    _write_new(remote, run, attempt, manifest)
    return True


def _write_new(remote: RemoteRun, run: RunFolder, attempt: int, path: Path) -> None:
    """Upload a file of a checkpoint that the copy should not have yet."""
    name = str(path.relative_to(run.path))
    remote.check_not_superseded(run, attempt)
    try:
        remote.write(path, name, new=True)
    except FileTaken:
        # The file is from an earlier try whose response was lost, or from a delayed write of an
        # earlier attempt. The check excludes a later attempt.
        remote.check_not_superseded(run, attempt)
        remote.remove(name)
        remote.write(path, name, new=True)


def _write_metrics(remote: RemoteRun, run: RunFolder) -> None:
    """Upload metrics.jsonl and new evaluations, which determine the best step for retention."""
    if run.metrics.exists():
        remote.write(run.metrics, run.metrics.name)
    copied = remote.files("eval")
    for path in sorted((run.path / "eval").glob("step-*.json")):
        if path.name not in copied or copied[path.name].bytes != path.stat().st_size:
            remote.write(path, f"eval/{path.name}")


def _remove(remote: RemoteRun, run: RunFolder, attempt: int, folder: str, names: list[str]) -> None:
    """Remove files of a copied checkpoint, its manifest first."""
    if names:
        remote.check_not_superseded(run, attempt)
    for name in sorted(names, key=lambda name: name != "manifest.json"):
        remote.remove(f"{folder}/{name}")


def retain_copies(
    remote: RemoteRun, run: RunFolder, newest: int, attempt: int, settings: CheckpointSettings
) -> None:
    """Apply retention to the copies, and remove unfinished ones.

    Args:
        remote: Copies of the run.
        run: Run folder.
        newest: Step of the newest checkpoint of this attempt; later copies are kept.
        attempt: Number of this attempt, registered with `remote`.
        settings: Retention settings.

    Raises:
        UploadSuperseded: if a later attempt has started.
        GigabatchError: if a file cannot be removed.
    """
    folders: dict[str, list[str]] = {}
    for path in remote.files("checkpoints"):
        folder, _, name = path.partition("/")
        folders.setdefault(folder, []).append(name)
    finished = {int(f.removeprefix("step-")): f for f in folders if "manifest.json" in folders[f]}
    kept = steps_to_keep(run, [step for step in finished if step <= newest], settings)
    # The run resumed from a step before these copies; they are replaced when training reaches those
    # steps again.
    kept |= {step for step in finished if step > newest}
    for folder in folders.keys() - {finished[step] for step in kept}:
        _remove(remote, run, attempt, f"checkpoints/{folder}", folders[folder])


class Copier:
    """Background copies of one attempt's checkpoints, on rank 0.

    A failed copy is logged and counted, and training continues: the checkpoint in the run folder is
    intact. The daemon thread exists only while there is something to copy.

    Args:
        remote: Copies of the run.
        run: Run folder.
        attempt: Number of this attempt.
        settings: Retention settings.
    """

    def __init__(
        self, remote: RemoteRun, run: RunFolder, attempt: int, settings: CheckpointSettings
    ) -> None:
        self.remote, self.run, self.attempt, self.settings = remote, run, attempt, settings
        self.failures = self.skipped = 0
        self.copied_step: int | None = None
        self.copy_s = 0.0
        self._registered = False
        self._current: int | None = None
        self._next: int | None = None
        self._change = threading.Condition()

    def offer(self, step: int) -> None:
        """Queue the committed checkpoint of `step`; it replaces one that still waits."""
        with self._change:
            if self._next not in (None, step):
                self.skipped += 1
                log.warning(
                    "checkpoint step-%08d is not copied: step-%08d is newer, and the copy of "
                    "step-%08d takes longer than the time between checkpoints",
                    self._next, step, self._current,
                )  # fmt: skip
            self._next = step
            if self._current is None:
                self._current, self._next = step, None
                threading.Thread(target=self._work, name="checkpoint copy", daemon=True).start()

    def busy(self) -> set[int]:
        """Return the steps being copied or waiting; retention must not remove their checkpoints."""
        with self._change:
            return {step for step in (self._current, self._next) if step is not None}

    def wait(self, alive: Callable[[], None]) -> None:
        """Wait until no copy is in progress or queued.

        Args:
            alive: Called every second while waiting.
        """
        logged = False
        while busy := self.busy():
            alive()
            with self._change:
                if self._current is not None and not self._change.wait(1.0) and not logged:
                    log.info("waiting for the copy of step-%08d to %s", max(busy), self.remote.url)
                    logged = True

    def metrics(self) -> dict[str, float]:
        """Return the number of failures, and the step and seconds of the newest copy, if any."""
        metrics = {"checkpoint/copy_failures": float(self.failures)}
        if self.copied_step is not None:
            metrics |= {
                "checkpoint/copied_step": self.copied_step,
                "checkpoint/copy_s": self.copy_s,
            }
        return metrics

    def _work(self) -> None:
        while self._current is not None:
            self._copy(self._current)
            with self._change:
                self._current, self._next = self._next, None
                self._change.notify_all()

    def _copy(self, step: int) -> None:
        began = time.monotonic()
        try:
            if not self._registered:
                self.remote.register_attempt(self.run, self.attempt)
                self._registered = True
            if not copy_checkpoint(self.remote, self.run, step, self.attempt):
                return
        except Exception as error:  # an uncaught error would end the thread without a log line
            self.failures += 1
            cause = str(error) if isinstance(error, GigabatchError) else repr(error)
            log.warning(
                "checkpoint step-%08d was NOT COPIED to %s (failure %d of this attempt; the "
                "checkpoint in %s is intact): %s",
                step, self.remote.url, self.failures, self.run.checkpoints, cause,
            )  # fmt: skip
            return
        self.copied_step, self.copy_s = step, time.monotonic() - began
        log.info("copied checkpoint step-%08d to %s", step, self.remote.url)
        try:
            retain_copies(self.remote, self.run, step, self.attempt, self.settings)
        except UploadSuperseded as error:
            log.warning("%s", error)
        except Exception as error:
            log.warning("%s: cannot remove old copies: %s", self.remote.url, error)
