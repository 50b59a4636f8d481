"""What the person at the terminal sees: the lines of train.log as they come.

Workers write train.log, wherever they run; this end only reads it. On a terminal a progress line
replaces the one before; elsewhere every line is printed.
"""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path
from types import TracebackType

from gigabatch.launcher.output import write
from gigabatch.trainer.monitoring.metrics import PROGRESS

_STAMP = len("2026-01-01 00:00:00 I ")
POLL = 0.2  # seconds


class Console:
    """Follows a train.log from its present end until the `with` block is left."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.position = log.stat().st_size if log.exists() else 0
        self.live = sys.stdout.isatty()
        self.rest, self.pending = "", False
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="console", daemon=True)

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
        """A message of the starting process itself."""
        self._show(text)

    def _follow(self) -> None:
        while not self.done.wait(POLL):
            self._read()
        self._read()
        if self.pending:
            write("\n")

    def _read(self) -> None:
        try:
            with open(self.log, encoding="utf-8", errors="replace") as file:
                file.seek(self.position)
                text = file.read()
                self.position = file.tell()
        except FileNotFoundError:
            return
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self._show(line[_STAMP:] if line[:2] == "20" else line)

    def _show(self, line: str) -> None:
        if not self.live:
            write(line + "\n")
            return
        progress = line.startswith(PROGRESS)
        if progress:
            line = line[: shutil.get_terminal_size().columns - 1]
        clear = "\r\x1b[K" if self.pending else ""
        write(f"{clear}{line}" + ("" if progress else "\n"))
        self.pending = progress
