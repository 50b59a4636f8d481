"""Writing to the terminal. Imports nothing heavy: short commands use it too."""

from __future__ import annotations

import os
import sys


def write(text: str) -> None:
    """To stdout, or nowhere once its reader has gone (such as `| head`): the run goes on."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def complain(text: str) -> None:
    """To stderr, or nowhere once its reader has gone (Ctrl-C ends a `2>&1 | tee` too): what
    follows, a checkpoint or the end, matters more."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
