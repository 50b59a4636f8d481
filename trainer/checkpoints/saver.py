"""Saving of checkpoints in the background: a snapshot in host memory, and a thread that writes it.

Training waits only for the snapshot. At most one write is in progress. All ranks check its result
together, so a failed write ends the run on every rank with the same message.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints.format import Tensors, write_checkpoint
from gigabatch.trainer.checkpoints.remote import remote_run
from gigabatch.trainer.checkpoints.upload import UPLOAD_RETRY, Copier
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.distributed import World
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
Snapshot = Callable[[], tuple[Mapping[str, Tensors], Mapping[str, Any]]]
"""Function that returns the tensors of each file and the JSON state, complete on rank 0. The
tensors share no memory with the training state. Collective: every rank must call it."""
Report = Callable[[int, Mapping[str, float]], None]
"""Function that receives a step and metrics of its checkpoint."""


class NotSaved(Exception):
    """A write failed with a transient error; the launcher restarts the workers."""


class _Write:
    """One checkpoint being written: a thread on rank 0, nothing on other ranks."""

    def __init__(self, step: int) -> None:
        self.step, self.problem = step, ""
        self.needs_user = True  # Whether only the user can fix the cause of a failure.
        self.blocked_s = self.write_s = 0.0
        self.thread: threading.Thread | None = None

    def start(self, write: Callable[[], None]) -> None:
        def work() -> None:
            began = time.monotonic()
            try:
                write()
                log.info("saved checkpoint step-%08d", self.step)
            except GigabatchError as error:
                self.problem = str(error)
            except BaseException as error:  # Nobody sees an exception that ends a thread.
                self.needs_user = False
                self.problem = str(error) if isinstance(error, OSError) else ""
                self.problem = self.problem or f"checkpoint {self.step} was not saved: {error!r}."
            self.write_s = time.monotonic() - began

        # A daemon, so that a second Ctrl-C aborts without waiting for it.
        self.thread = threading.Thread(target=work, name=f"checkpoint-{self.step}", daemon=True)
        self.thread.start()

    @property
    def ended(self) -> bool:
        return self.thread is not None and not self.thread.is_alive()

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()


class Saver:
    """Saves one attempt's checkpoints.

    The end of the context waits for the write in progress, also after an error. If that write
    failed, its error replaces the other one, which it has probably caused.

    Args:
        run: The run.
        world: This process and its group.
        attempt: Number of this attempt.
        settings: When to save, which checkpoints to keep, and where to copy them.
        report: Receives `checkpoint/blocked_s` (seconds that training waited) and
            `checkpoint/write_s` of each committed checkpoint.
    """

    def __init__(
        self,
        run: RunFolder,
        world: World,
        attempt: int,
        settings: CheckpointSettings,
        report: Report,
    ) -> None:
        self.run, self.world, self.attempt, self.settings = run, world, attempt, settings
        self.report = report
        self.write: _Write | None = None
        remote = remote_run(settings, run.path.name, UPLOAD_RETRY) if world.is_main else None
        self.copier = Copier(remote, run, attempt, settings) if remote else None

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Take a snapshot and start to write it. Collective: every rank must call it.

        Waits for the previous write first, so that host memory never has two snapshots.

        Raises:
            GigabatchError: as `finish_write`.
            NotSaved: as `finish_write`.
        """
        began = time.monotonic()
        self.finish_write()
        files, state = snapshot()
        write = self.write = _Write(step)
        if self.world.is_main:
            write.start(lambda: self._write(step, files, state))
        if not self.settings.asynchronous:
            write.join()
        write.blocked_s = time.monotonic() - began
        if not self.settings.asynchronous:
            self.finish_write()

    def _write(self, step: int, files: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        busy = self.copier.busy() if self.copier else set()
        write_checkpoint(self.run, self.attempt, step, files, state, self.settings, busy)
        self.copy(step)

    def copy(self, step: int) -> None:
        """Queue a committed checkpoint to be copied; one that was copied before is skipped."""
        if self.copier:
            self.copier.offer(step)

    def await_copies(self, step: int, alive: Callable[[], None]) -> None:
        """Wait until the copy of the last checkpoint has succeeded or failed. Not collective.

        Args:
            step: Step of the last checkpoint; 0 for none.
            alive: Called every second while waiting.
        """
        if self.copier and step:
            # Queued again, to copy the last metrics and evaluation, or to retry a failed copy.
            self.copier.offer(step)
            self.copier.wait(alive)
            self.report(step, self.copier.metrics())

    def metrics(self) -> dict[str, float]:
        """Return the metrics of copying; empty on other ranks and without `copy_to`."""
        return self.copier.metrics() if self.copier else {}

    def write_ended(self) -> bool:
        """Return whether this rank's write has ended and `finish_write` must report it."""
        return self.write is not None and self.write.ended

    def finish_write(self) -> None:
        """Wait for the write in progress, if any, and report it.

        Collective: every rank must call it. If the write failed, earlier checkpoints are untouched.

        Raises:
            GigabatchError: on every rank, if it failed and only the user can fix the cause.
            NotSaved: on every rank, if it failed with a transient error.
        """
        write, self.write = self.write, None
        if write is None:
            return
        write.join()
        problem, needs_user = self.world.broadcast((write.problem, write.needs_user))
        if problem:
            raise _error(problem, needs_user)
        tags = {"checkpoint/blocked_s": write.blocked_s, "checkpoint/write_s": write.write_s}
        self.report(write.step, tags)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.write is None or (kind is not None and not issubclass(kind, Exception)):
            return
        self.write.join()  # Without a collective: other ranks may have exited.
        if self.write.problem:
            raise _error(self.write.problem, self.write.needs_user) from error


def _error(problem: str, needs_user: bool) -> Exception:
    return GigabatchError(problem) if needs_user else NotSaved(problem)
