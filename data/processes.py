"""Processes that work for another: they end with it, and leave Ctrl-C to it."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


def worker_pool(processes: int) -> ProcessPoolExecutor:
    """Processes that end with this one, however that ends. Submit in `ctrl_c_held`."""
    context = multiprocessing.get_context("spawn")  # the caller may have threads
    return ProcessPoolExecutor(processes, context, _as_worker)


def _as_worker() -> None:
    leave_ctrl_c_to_parent()
    end_with_parent(signal.SIGKILL)


def leave_ctrl_c_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_parent(number: signal.Signals) -> None:
    """The system sends this process `number` when the thread that started it ends."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def ctrl_c_held() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; processes started inside never hear of it, not even
    while they import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
