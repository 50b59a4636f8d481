"""Signal handling: Ctrl-C, SIGTERM and preemption notices request a graceful stop.

A graceful stop finishes the step, saves a checkpoint and exits. Slurm sends the signal named by
`--signal=B:USR1@120`, other schedulers SIGTERM. After any signal except Ctrl-C, the exit code
requests a restart.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from gigabatch.launcher.output import write_stderr

INTERRUPTED = 130
"""Exit code after Ctrl-C: stopped cleanly, with a checkpoint."""
REQUEUE = 75
"""Exit code after SIGTERM, SIGUSR1 or SIGUSR2 (EX_TEMPFAIL): stopped; start it again."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


_ctrl_c_received = False


def ctrl_c_received() -> bool:
    """Return whether a KeyboardInterrupt of this process may be that of a Ctrl-C.

    Code can raise KeyboardInterrupt too, which is then a failure of that code.
    """
    return _ctrl_c_received


def _raise_interrupt(number: int = 0, frame: FrameType | None = None) -> NoReturn:
    """Handle SIGINT as Python does, and remember it."""
    global _ctrl_c_received
    _ctrl_c_received = True
    raise KeyboardInterrupt


@contextmanager
def remember_ctrl_c() -> Iterator[None]:
    """Make `ctrl_c_received` work inside the block."""
    global _ctrl_c_received
    _ctrl_c_received = False
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # a parent lets this process ignore Ctrl-C
        return
    signal.signal(signal.SIGINT, _raise_interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _raise_interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class StopRequest:
    """The signal that requested a stop, if any.

    Attributes:
        signal: Number of the first signal received; None before it.
        overdue: True once the time for a graceful stop has passed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.overdue = False

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.signal == signal.SIGINT else REQUEUE


@contextmanager
def abort_on_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C inside the block.

    It is raised again at the end of the block, in case a library has caught it.
    """
    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        _raise_interrupt()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
        if interrupted:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stop_on_signals(
    grace: float,
    on_overdue: Callable[[StopRequest], None],
    on_request: Callable[[], None] = lambda: None,
) -> Iterator[StopRequest]:
    """Yield a StopRequest that is set by the signals in STOPPING. A second Ctrl-C aborts.

    Args:
        grace: Seconds for a graceful stop.
        on_overdue: Called if the block has not ended `grace` seconds after the first signal. Runs
            in a separate thread, because the main thread may be in a step that never ends.
        on_request: Called once, with the first signal.
    """
    request = StopRequest()
    timer = threading.Timer(grace, lambda: _end_overdue(request, on_overdue))
    timer.daemon = True

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            if number == signal.SIGINT:
                _raise_interrupt()
            return  # schedulers repeat their signals
        request.signal = number
        timer.start()
        on_request()
        write_stderr("\nstopping after this step, with a checkpoint (Ctrl-C: abort now)")

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield request
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_overdue(request: StopRequest, on_overdue: Callable[[StopRequest], None]) -> None:
    request.overdue = True
    on_overdue(request)


def interrupt_main(request: StopRequest) -> None:
    """Raise KeyboardInterrupt in the main thread, which is waiting for other processes."""
    os.kill(os.getpid(), signal.SIGINT)
