"""Run one hostile input: a value or a GigabatchError, soon, and without much memory."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from gigabatch.data.errors import GigabatchError

SECONDS = 5
MEMORY_KIB = 1 << 20
"""Memory in KiB by which all inputs of a test may raise the peak of the process."""


class Hang(BaseException):
    """An input took too long; not an Exception, which decoding would catch."""


def _raise_hang(number: int, frame: FrameType | None) -> None:
    raise Hang


class Guard:
    """Runs inputs, and counts values and errors."""

    def __init__(self) -> None:
        self.values = self.errors = 0
        self.failures: list[str] = []
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function; record anything but a value or a GigabatchError as a failure."""
        before = signal.signal(signal.SIGALRM, _raise_hang)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            value = function(*arguments)
        except GigabatchError as error:
            self.errors += 1
            text = str(error)
            if len(text) > 2000 or not text:
                self.failures.append(f"{name}: a message of {len(text)} characters: {text[:200]}")
            return None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            shown = repr(arguments[0])[:300]
            self.failures.append(f"{name}: {type(error).__name__}: {str(error)[:200]} <- {shown}")
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        self.values += 1
        return value

    def check(self, values: int, errors: int) -> None:
        """Check the outcomes: no failure, and at least so many values and errors."""
        assert not self.failures, "\n".join([f"{len(self.failures)} failures", *self.failures[:20]])
        assert self.values >= values, f"{self.values} values, {self.errors} errors"
        assert self.errors >= errors, f"{self.values} values, {self.errors} errors"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.peak
        assert grown < MEMORY_KIB, f"memory grew by {grown / 1024:.0f} MiB"
