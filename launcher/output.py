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
