"""Errors of loader workers: sent to the training process as values, and raised there."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any, TypeVar

from torch.utils.data import get_worker_info

from gigabatch.data.errors import GigabatchError
from gigabatch.data.failures import LostProcess, as_failure, explain_loader_failure

T = TypeVar("T")
SIGCHLD_TIME_S = 1.0
"""Seconds to wait for the signal of a loader worker that has ended."""


def prepare_worker(worker: int) -> None:
    """Prepare a forked loader worker: its signal handlers, and the reports of its errors."""
    # The parent handles Ctrl-C, and ends its loader workers with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # As a plain function it becomes a method, which has the queue; this process has no other queue.
    queue_class: Any = Queue
    queue_class._on_queue_feeder_error = _send_feeder_error


@dataclass(frozen=True)
class WorkerError:
    """An error that ends the stream, sent from a loader worker to the training process.

    Attributes:
        message: Message of a GigabatchError, or the traceback of any other exception.
        is_explained: Whether it is the former.
    """

    message: str
    is_explained: bool

    @staticmethod
    def of(error: BaseException) -> WorkerError:
        """Return the record of an exception."""
        failure = as_failure(error)
        if isinstance(failure, GigabatchError):
            return WorkerError(str(failure), True)
        text = "".join(traceback.format_exception(error)).rstrip()
        note = f"\n{failure}" if failure is not error else ""
        return WorkerError(f"{text}{note}", False)

    def exception(self) -> Exception:
        """Return the exception to raise in the training process."""
        if self.is_explained:
            return GigabatchError(self.message)
        return LoaderError(f"a loader worker failed:\n{self.message}")


class LoaderError(Exception):
    """A loader worker failed; the message contains its traceback."""


def errors_as_values(batches: Iterator[T]) -> Iterator[T | WorkerError]:
    """Yield the batches; an error becomes the last value.

    torch passes only some exceptions on. It takes KeyboardInterrupt and SystemExit for the end of
    the worker, and waits forever for an exception whose class cannot be pickled.
    """
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except GigabatchError as error:
            yield WorkerError.of(error)
            return
        except BaseException as error:
            if get_worker_info() is None:
                raise  # in the training process itself, where the traceback is more useful
            yield WorkerError.of(error)
            return
        yield batch


def _send_feeder_error(queue: Any, error: BaseException, item: Any) -> None:
    """Send the error of a batch that could not be sent, in a loader worker's queue thread.

    The thread places tensors in /dev/shm, each with an open file. By default, it prints an error of
    that and drops the batch, and the training process waits for it forever.
    """
    queue.put((item[0], WorkerError.of(error)))


def raise_errors(batches: Iterator[T | WorkerError]) -> Iterator[T]:
    """Yield the batches; raise the exception of a WorkerError."""
    for batch in _name_lost_workers(iter(batches)):
        if isinstance(batch, WorkerError):
            del batches  # otherwise the traceback would keep the loader's workers alive
            raise batch.exception()
        yield batch


def _name_lost_workers(batches: Iterator[T]) -> Iterator[T]:
    """Yield the batches; a connection that breaks because a worker died is a LostProcess."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # The worker died while it sent a batch. torch's handler of SIGCHLD raises an error with
            # the reason, here or in the sleep.
            time.sleep(SIGCHLD_TIME_S)
            if explained := explain_loader_failure(error):
                raise explained from error
            raise LostProcess(f"a loader worker ended while it sent a batch ({error}).") from error
        yield batch
