"""Terminal view of a run: prints the lines of train.log as workers write them.

Workers write train.log on their own machines; the starting process only reads it. On a terminal,
each progress line replaces the previous one; elsewhere every line is printed.
"""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path
from types import TracebackType

from gigabatch.launcher.output import write
from gigabatch.trainer.monitoring.metrics import PROGRESS

_STAMP_LENGTH = len("2026-01-01 00:00:00 I ")
POLL_S = 0.2


class Console:
    """Prints what is appended to a train.log until the `with` block ends."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.position = log.stat().st_size if log.exists() else 0
        self.is_terminal = sys.stdout.isatty()
        self.incomplete_line = ""
        self.on_progress_line = False
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._poll, name="console", daemon=True)

    def __enter__(self) -> Console:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.done.set()
        self.thread.join(timeout=5)

    def say(self, text: str) -> None:
        """Print a message of the starting process itself."""
        self._show(text)

    def _poll(self) -> None:
        while not self.done.wait(POLL_S):
            self._read()
        self._read()
        if self.on_progress_line:
            write("\n")

    def _read(self) -> None:
        try:
            with open(self.log, encoding="utf-8", errors="replace") as file:
                file.seek(self.position)
                text = file.read()
                self.position = file.tell()
        except FileNotFoundError:
            return
        *lines, self.incomplete_line = (self.incomplete_line + text).split("\n")
        for line in lines:
            self._show(line[_STAMP_LENGTH:] if line[:2] == "20" else line)

    def _show(self, line: str) -> None:
        if not self.is_terminal:
            write(line + "\n")
            return
        is_progress = line.startswith(PROGRESS)
        if is_progress:
            line = line[: shutil.get_terminal_size().columns - 1]
        clear = "\r\x1b[K" if self.on_progress_line else ""
        write(f"{clear}{line}" + ("" if is_progress else "\n"))
        self.on_progress_line = is_progress
