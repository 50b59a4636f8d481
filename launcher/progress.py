"""Progress display of long operations: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from gigabatch.launcher.output import write_stderr

FIRST_LINE_S, SECONDS_BETWEEN_LINES = 2.0, 10.0


_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn())  # fmt: skip


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `progress(done, total)`. Nothing is shown before its first call."""
    screen = rich.console.Console(stderr=True)
    if not screen.is_terminal:
        yield _ProgressLines(description)
        return
    with Progress(*_COLUMNS, transient=True, console=screen) as bars:
        task = bars.add_task(description, total=None, visible=False)
        yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yield `show(description, done, total)`, for operations that follow each other."""
    screen = rich.console.Console(stderr=True)
    if not screen.is_terminal:
        yield _ProgressLines("").show
        return
    with Progress(*_COLUMNS, transient=True, console=screen) as bars:
        tasks: dict[str, TaskID] = {}

        def show(description: str, done: int, total: int) -> None:
            if description not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done, total=total, visible=done < total)

        yield show


class _ProgressLines:
    def __init__(self, description: str) -> None:
        self.description = description
        self.next = time.monotonic() + FIRST_LINE_S

    def __call__(self, done: int, total: int) -> None:
        self.show(self.description, done, total)

    def show(self, description: str, done: int, total: int) -> None:
        """Print a line if the last one is old enough."""
        if time.monotonic() > self.next and done < total:
            self.next = time.monotonic() + SECONDS_BETWEEN_LINES
            write_stderr(f"{description}: {done:,} of {total:,}")
