"""The first sign of life of a command: a line while it has not written anything.

Loading PyTorch, opening shards or reading a checkpoint may take seconds on a busy machine or a slow
disk, for any command. Imports nothing heavy, because it runs before all other imports.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

FIRST_LINE_S, REPEAT_S = 3.0, 30.0
"""Seconds of silence before the first line, and between the following ones."""
_GROUPS = ("data", "bench", "jobs")


@contextmanager
def sign_of_life(arguments: Sequence[str], first: float = FIRST_LINE_S) -> Iterator[None]:
    """Write a line to stderr after `first` seconds in which nothing was written, and again later.

    Args:
        arguments: Command line, without the program.
        first: Seconds before the first line.
    """
    if os.environ.get("RANK", "0") != "0":
        yield  # one rank of a torchrun is enough
        return
    written = threading.Event()
    restore = [_notify(stream, written.set) for stream in (sys.stdout, sys.stderr)]
    began = time.monotonic()

    def watch() -> None:
        wait = first
        while not written.wait(wait):
            seconds = time.monotonic() - began
            text = f"gigabatch {verb(arguments)}: working, no output yet ({seconds:.0f} s)\n"
            os.write(2, text.encode())  # not by `write`, which would count as output
            wait = REPEAT_S

    threading.Thread(target=watch, name="sign-of-life", daemon=True).start()
    try:
        yield
    finally:
        written.set()
        for undo in restore:
            undo()


def verb(arguments: Sequence[str]) -> str:
    """Return the command's name, such as `train` or `data index`."""
    words = [word for word in arguments if not word.startswith("-")]
    return " ".join(words[: 2 if words[:1] and words[0] in _GROUPS else 1])


def _notify(stream: TextIO, on_write: Callable[[], None]) -> Callable[[], None]:
    """Call `on_write` at every write to a stream; return a function that ends that."""
    write = stream.write

    def notifying(text: str) -> int:
        on_write()
        return write(text)

    def undo() -> None:
        if vars(stream).get("write") is notifying:
            del vars(stream)["write"]

    try:
        vars(stream)["write"] = notifying
    except TypeError:  # a stream of another kind, which the command's caller has put there
        on_write()
    return undo
