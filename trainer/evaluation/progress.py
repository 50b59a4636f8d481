"""Progress of long loops of an evaluation, shown by whoever started it.

Loops far below a task call `tracked`; `showing` chooses what that does, and by default nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
Show = Callable[[str, int, int], None]
"""Function of (description, steps done, steps in total)."""
SECONDS_BETWEEN_LINES = 10.0
_show: ContextVar[Show | None] = ContextVar("show", default=None)


@contextmanager
def showing(show: Show | None) -> Iterator[None]:
    """Pass the progress of loops inside the block to `show`; None shows nothing."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)


def tracked(description: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yield the items, and report how many are done.

    Args:
        description: What the loop does, such as `ranking queries`.
        items: The items.
        total: Their number.
    """
    show = _show.get()
    if show is None:
        yield from items
        return
    show(description, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        show(description, done, total)


def log_progress(prefix: str) -> Show:
    """Return a `show` that writes a log line every 10 seconds.

    Args:
        prefix: First words of the lines.
    """
    last = time.monotonic()

    def show(description: str, done: int, total: int) -> None:
        nonlocal last
        if done < total and time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info(f"{prefix}: {description}: {done:,} of {total:,}")

    return show
