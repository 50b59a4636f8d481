"""Ctrl-C and SIGTERM ask for a clean end: finish the step, save, leave."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit code after Ctrl-C: stopped cleanly, with a checkpoint."""
REQUEUE = 75
"""Exit code after SIGTERM (EX_TEMPFAIL): stopped cleanly, with a checkpoint; start it again."""


class StopRequest:
    """Whether a signal has come, and which."""

    def __init__(self) -> None:
        self.signal: int | None = None

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
def stop_on_signals(also: Callable[[], None] = lambda: None) -> Iterator[StopRequest]:
    """A StopRequest that SIGINT and SIGTERM set; `also` is called once. A second one aborts."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = number
        print(
            "\nstopping after this step, with a checkpoint (again: abort at once)",
            file=sys.stderr,
            flush=True,
        )
        also()

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
