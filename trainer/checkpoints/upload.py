"""Copying committed checkpoints to `checkpoint.copy_to`, in a thread that no step waits for.

At most one copy is in flight. A checkpoint that is committed meanwhile waits; a newer one takes its
place, and the log says so. All files are new ones (a stalled write of a cut-off attempt cannot land
on a later attempt's) and the manifest is the last.
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
from gigabatch.trainer.checkpoints.remote import Overtaken, RemoteRun
from gigabatch.trainer.checkpoints.retention import steps_to_keep
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
PATIENCE = Retry(attempts=7, first_wait_s=1.0)
"""Of each request: outages of a minute or two are borne."""


def copy_checkpoint(place: RemoteRun, run: RunFolder, step: int, attempt: int) -> bool:
    """Copy the checkpoint of `step`, in place of what is there of that step; false where it was
    there already.

    Raises Overtaken where a later attempt has begun; GigabatchError where the copy does not stand;
    OSError where the checkpoint here cannot be read.
    """
    place.refuse_overtaken(run, attempt)
    folder = f"checkpoints/step-{step:08d}"
    manifest = run.path / folder / "manifest.json"
    text = manifest.read_text()
    _write_beside(place, run)
    if place.read(f"{folder}/manifest.json") == text:
        return False
    _remove(place, run, attempt, folder, list(place.files(folder)))
    wanted = {name: entry["bytes"] for name, entry in json.loads(text)["files"].items()}
    for name in wanted:
        _write_new(place, run, attempt, run.path / folder / name)
    there = {name: state.bytes for name, state in place.files(folder).items()}
    if there != wanted:
        raise GigabatchError(
            f"{place.url}/{folder}: what lies there is not what was written: {there} in place of "
            f"{wanted}. Does something else write there?"
        )
    _write_new(place, run, attempt, manifest)
    return True


def _write_new(place: RemoteRun, run: RunFolder, attempt: int, path: Path) -> None:
    name = str(path.relative_to(run.path))
    place.refuse_overtaken(run, attempt)
    try:
        place.write(path, name, new=True)
    except FileTaken:  # our own, if an answer was lost; or a stalled write of an attempt before
        place.refuse_overtaken(run, attempt)
        place.remove(name)
        place.write(path, name, new=True)


def _write_beside(place: RemoteRun, run: RunFolder) -> None:
    """The curves so far, and the evaluations, of which retention by the best makes use."""
    if run.metrics.exists():
        place.write(run.metrics, run.metrics.name)
    there = place.files("eval")
    for path in sorted((run.path / "eval").glob("step-*.json")):
        if path.name not in there or there[path.name].bytes != path.stat().st_size:
            place.write(path, f"eval/{path.name}")


def _remove(place: RemoteRun, run: RunFolder, attempt: int, folder: str, names: list[str]) -> None:
    """Remove files of a checkpoint's folder, its manifest before all others."""
    if names:
        place.refuse_overtaken(run, attempt)
    for name in sorted(names, key=lambda name: name != "manifest.json"):
        place.remove(f"{folder}/{name}")


def retain_copies(
    place: RemoteRun, run: RunFolder, newest: int, attempt: int, settings: CheckpointSettings
) -> None:
    """Remove what `settings` does not keep up to `newest`, and copies that were cut off. Raises
    as `copy_checkpoint` does."""
    files = place.files("checkpoints")
    folders: dict[str, list[str]] = {}
    for path in files:
        folder, _, name = path.partition("/")
        folders.setdefault(folder, []).append(name)
    whole = {int(f.removeprefix("step-")): f for f in folders if "manifest.json" in folders[f]}
    kept = steps_to_keep(run, [step for step in whole if step <= newest], settings)
    kept |= {step for step in whole if step > newest}  # of a run that goes on from before them
    for folder in folders.keys() - {whole[step] for step in kept}:
        _remove(place, run, attempt, f"checkpoints/{folder}", folders[folder])


class Copier:
    """Copies what it is offered, newest first, for one attempt on rank 0.

    A copy that fails is said in the log and counted; the run goes on, for the checkpoint here
    stands. A daemon thread, alive only while there is something to copy.
    """

    def __init__(
        self, place: RemoteRun, run: RunFolder, attempt: int, settings: CheckpointSettings
    ) -> None:
        self.place, self.run, self.attempt, self.settings = place, run, attempt, settings
        self.failures = self.skipped = 0
        self.copied: int | None = None
        self.copy_s = 0.0
        self._begun = False
        self._now: int | None = None
        self._next: int | None = None
        self._change = threading.Condition()

    def offer(self, step: int) -> None:
        """Copy the checkpoint of `step`, which is committed, as soon as may be."""
        with self._change:
            if self._next not in (None, step):
                self.skipped += 1
                log.warning(
                    "checkpoint step-%08d is not copied: step-%08d is newer, and the copy of "
                    "step-%08d takes longer than from one checkpoint to the next",
                    self._next, step, self._now,
                )  # fmt: skip
            self._next = step
            if self._now is None:
                self._now, self._next = step, None
                threading.Thread(target=self._work, name="checkpoint copy", daemon=True).start()

    def busy(self) -> set[int]:
        """Steps whose checkpoint here is still needed."""
        with self._change:
            return {step for step in (self._now, self._next) if step is not None}

    def wait(self, alive: Callable[[], None]) -> None:
        """Until all that was offered is copied, or has failed; `alive` is called each second."""
        said = False
        while busy := self.busy():
            alive()
            with self._change:
                if self._now is not None and not self._change.wait(1.0) and not said:
                    log.info("waiting for the copy of step-%08d to %s", max(busy), self.place.url)
                    said = True

    def metrics(self) -> dict[str, float]:
        found = {"checkpoint/copy_failures": float(self.failures)}
        if self.copied is not None:
            found |= {"checkpoint/copied_step": self.copied, "checkpoint/copy_s": self.copy_s}
        return found

    def _work(self) -> None:
        while self._now is not None:
            self._copy(self._now)
            with self._change:
                self._now, self._next = self._next, None
                self._change.notify_all()

    def _copy(self, step: int) -> None:
        began = time.monotonic()
        try:
            if not self._begun:
                self.place.begin(self.run, self.attempt)
                self._begun = True
            if not copy_checkpoint(self.place, self.run, step, self.attempt):
                return
        except Exception as error:  # a thread must not die unheard
            self.failures += 1
            cause = str(error) if isinstance(error, GigabatchError) else repr(error)
            log.warning(
                "checkpoint step-%08d was NOT COPIED to %s (it stands in %s; failure %d of this "
                "attempt): %s",
                step, self.place.url, self.run.checkpoints, self.failures, cause,
            )  # fmt: skip
            return
        self.copied, self.copy_s = step, time.monotonic() - began
        log.info("copied checkpoint step-%08d to %s", step, self.place.url)
        try:
            retain_copies(self.place, self.run, step, self.attempt, self.settings)
        except Overtaken as error:
            log.warning("%s", error)
        except Exception as error:
            log.warning("%s: old copies could not be removed: %s", self.place.url, error)
