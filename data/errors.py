"""Exception types for errors that a user can fix, and texts of values and errors in messages."""

from __future__ import annotations

import re
import reprlib
from typing import Any


class GigabatchError(Exception):
    """An error in the configuration, the data or the run folder.

    The message says what is wrong, where, why, and which key or command fixes it. The command line
    prints it without a traceback and exits with code 2.
    """


class BadSample(GigabatchError):
    """Raised for a sample that cannot be used. A run substitutes another sample and records it."""


def describe_error(error: BaseException) -> str:
    """Describe an error of a library in one short line, which is the same in every run."""
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split())).rstrip(" .")
    text = text if len(text) <= 200 else f"{text[:197]}..."
    if text and isinstance(error, ValueError | OSError):
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


def brief(value: Any) -> str:
    """Return the repr of a value, shortened to 60 characters; any nesting and any size."""
    limited = reprlib.Repr()
    limited.maxstring = limited.maxother = limited.maxlong = 60
    text = limited.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
