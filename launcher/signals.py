"""Ctrl-C, SIGTERM and the notices of preemption ask for a clean end: finish the step, save, leave.

Slurm sends what `--signal=B:USR1@120` says, others SIGTERM; all but Ctrl-C mean: start it again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from gigabatch.launcher.output import complain

INTERRUPTED = 130
"""Exit code after Ctrl-C: stopped cleanly, with a checkpoint."""
REQUEUE = 75
"""Exit code after SIGTERM, SIGUSR1 or SIGUSR2 (EX_TEMPFAIL): stopped; start it again."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether a signal has come, and which. `overdue`: the time given for a clean end is over."""

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
    """Ctrl-C raises KeyboardInterrupt inside, as ever; and again at the end of the block where
    some library has swallowed it."""
    came = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
        if came:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stop_on_signals(
    grace: float, leave: Callable[[StopRequest], None], also: Callable[[], None] = lambda: None
) -> Iterator[StopRequest]:
    """A StopRequest that STOPPING signals set; `also` is called once. Ctrl-C after that aborts.

    Where the block has not ended `grace` seconds later, `leave` is called, in a thread: the main
    one may be in a step that never ends.
    """
    request = StopRequest()
    timer = threading.Timer(grace, lambda: _give_up(request, leave))
    timer.daemon = True

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # schedulers repeat themselves
        request.signal = number
        timer.start()
        also()
        complain("\nstopping after this step, with a checkpoint (Ctrl-C: abort at once)")

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield request
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _give_up(request: StopRequest, leave: Callable[[StopRequest], None]) -> None:
    request.overdue = True
    leave(request)


def interrupt_main(request: StopRequest) -> None:
    """Raise KeyboardInterrupt in the main thread, which is waiting for others."""
    os.kill(os.getpid(), signal.SIGINT)
