"""Progress display of long operations: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `progress(done, total)`. Nothing is shown before its first call."""
    screen = rich.console.Console(stderr=True)
    if not screen.is_terminal:
        yield _ProgressLines(description)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, transient=True, console=screen) as bars:
        task = bars.add_task(description, total=None, visible=False)
        yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)


class _ProgressLines:
    def __init__(self, description: str) -> None:
        self.description, self.last = description, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last > SECONDS_BETWEEN_LINES and done < total:
            self.last = time.monotonic()
            print(f"{self.description}: {done:,} of {total:,}", file=sys.stderr, flush=True)
