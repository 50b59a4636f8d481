"""Start child processes that exit with their parent and ignore Ctrl-C."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def worker_pool(processes: int) -> ProcessPoolExecutor:
    """Return a pool of processes that exit with this one, however it ends.

    Call `submit` inside `ctrl_c_deferred`: the pool starts its processes there.
    """
    context = multiprocessing.get_context("spawn")  # fork is unsafe if the caller has threads
    return ProcessPoolExecutor(processes, context, _init_worker)


def _init_worker() -> None:
    ignore_ctrl_c()
    exit_with_parent(signal.SIGKILL)


def ignore_ctrl_c() -> None:
    """Ignore SIGINT in this process; its parent handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def exit_with_parent(number: signal.Signals) -> None:
    """Make the kernel send signal `number` to this process when its parent's thread ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


@contextmanager
def ctrl_c_deferred() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block.

    Processes started inside inherit the blocked signal and never receive Ctrl-C, not even while
    they import modules.
    """
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
