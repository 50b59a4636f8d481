"""Output to the terminal. Imports nothing heavy, because short commands use it too."""

from __future__ import annotations

import os
import sys


def write(text: str) -> None:
    """Write to stdout. If its reader has exited (as in `| head`), discard this and later text."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def write_stderr(text: str) -> None:
    """Write to stderr. If its reader has exited, discard this and later text.

    Ctrl-C in `gigabatch train ... 2>&1 | tee log` also ends tee, and must not make the following
    checkpoint fail.
    """
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
