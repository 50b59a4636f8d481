"""Saving while the run goes on: a snapshot in host memory, then a thread that writes it.

The step waits for the snapshot alone. At most one write is in flight; each is settled by all ranks
together, so that a write that failed ends the run on every rank, and with the same words.
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
from gigabatch.trainer.checkpoints.upload import PATIENCE, Copier
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.distributed import World
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
Snapshot = Callable[[], tuple[Mapping[str, Tensors], Mapping[str, Any]]]
"""A collective: the tensors of each file, which must share no memory with what trains on, and the
state, on rank 0."""
Report = Callable[[int, Mapping[str, float]], None]


class NotSaved(Exception):
    """A write failed for a reason that may pass: the workers end, and are started again."""


class _Write:
    """One checkpoint on its way to the disk: on rank 0 a thread, elsewhere nothing."""

    def __init__(self, step: int) -> None:
        self.step, self.fault = step, ""
        self.lasting = True  # whether only the user can mend it
        self.blocked_s = self.write_s = 0.0
        self.thread: threading.Thread | None = None

    def start(self, write: Callable[[], None]) -> None:
        def work() -> None:
            began = time.monotonic()
            try:
                write()
                log.info("saved checkpoint step-%08d", self.step)
            except GigabatchError as error:
                self.fault = str(error)
            except BaseException as error:  # a thread must not die unheard
                self.lasting = False
                self.fault = str(error) if isinstance(error, OSError) else ""
                self.fault = self.fault or f"checkpoint {self.step} was not saved: {error!r}."
            self.write_s = time.monotonic() - began

        # A daemon: a second Ctrl-C, which aborts, does not wait for it.
        self.thread = threading.Thread(target=work, name=f"checkpoint-{self.step}", daemon=True)
        self.thread.start()

    @property
    def over(self) -> bool:
        return self.thread is not None and not self.thread.is_alive()

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()


class Saver:
    """Saves one attempt's checkpoints. `report` gets a step and the tags `checkpoint/blocked_s`
    (seconds that training waited) and `checkpoint/write_s` of each that was committed.

    Leaving the context waits for the write in flight, also after an error. Raises GigabatchError
    there, in place of that error, where the write failed: a full disk explains what came after.
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
        place = remote_run(settings, run.path.name, PATIENCE) if world.is_main else None
        self.copier = Copier(place, run, attempt, settings) if place else None

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Take a snapshot and begin to write it; a write before it is awaited first, so that host
        memory never holds two. A collective. Raises GigabatchError as `settle` does."""
        began = time.monotonic()
        self.settle()
        files, state = snapshot()
        write = self.write = _Write(step)
        if self.world.is_main:
            write.start(lambda: self._write(step, files, state))
        if not self.settings.asynchronous:
            write.join()
        write.blocked_s = time.monotonic() - began
        if not self.settings.asynchronous:
            self.settle()

    def _write(self, step: int, files: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        busy = self.copier.busy() if self.copier else set()
        write_checkpoint(self.run, self.attempt, step, files, state, self.settings, busy)
        self.copy(step)

    def copy(self, step: int) -> None:
        """Let the checkpoint of `step`, which is committed, be copied to `checkpoint.copy_to`,
        unless it is there already."""
        if self.copier:
            self.copier.offer(step)

    def await_copies(self, step: int, alive: Callable[[], None]) -> None:
        """Until the copy of the last checkpoint, of `step`, has ended, well or not. Not a
        collective; `alive` is called each second meanwhile."""
        if self.copier and step:
            self.copier.offer(step)  # again: the curves' end, the last evaluation, what failed
            self.copier.wait(alive)
            self.report(step, self.copier.metrics())

    def metrics(self) -> dict[str, float]:
        """How copying goes, on rank 0, where anything is copied."""
        return self.copier.metrics() if self.copier else {}

    def over(self) -> bool:
        """Whether, on this rank, a write has ended that `settle` has not yet been told of."""
        return self.write is not None and self.write.over

    def settle(self) -> None:
        """Await the write in flight, if any. A collective.

        Raises GigabatchError on every rank where it failed and only the user can mend that, and
        NotSaved where it may pass; earlier checkpoints are untouched.
        """
        write, self.write = self.write, None
        if write is None:
            return
        write.join()
        fault, lasting = self.world.share((write.fault, write.lasting))
        if fault:
            raise _raised(fault, lasting)
        tags = {"checkpoint/blocked_s": write.blocked_s, "checkpoint/write_s": write.write_s}
        self.report(write.step, tags)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.write is None or (kind is not None and not issubclass(kind, Exception)):
            return
        self.write.join()  # not settled: other ranks may be gone
        if self.write.fault:
            raise _raised(self.write.fault, self.write.lasting) from error


def _raised(fault: str, lasting: bool) -> Exception:
    return GigabatchError(fault) if lasting else NotSaved(fault)
