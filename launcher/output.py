"""Writing to the terminal. Imports nothing heavy, because short commands use it too."""

from __future__ import annotations

import os
import sys


def write(text: str) -> None:
    """Write to stdout; discard it if its reader has gone (as in `| head`), so the run continues."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def complain(text: str) -> None:
    """Write to stderr; discard it if its reader has gone.

    Ctrl-C in `gigabatch train ... 2>&1 | tee log` also ends tee. The checkpoint that follows must
    not fail because of that.
    """
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
