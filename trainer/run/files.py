"""Atomic file writes: a crash leaves the old file or the new one, never a partial one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gigabatch.data.files import atomic_replace


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file, sync it, then rename it over `path`."""
    with atomic_replace(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def sync_file(path: Path) -> None:
    """Flush a file to its disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def to_json(value: Any) -> str:
    """Return indented JSON; values of other types become strings."""
    return json.dumps(value, indent=1, default=str) + "\n"


def create_numbered(folder: Path, name: Callable[[int], str], text: str) -> int:
    """Create the first of the files `name(1)`, `name(2)`, ... that does not exist yet.

    Returns its number. The creation is exclusive: no two callers get the same number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            with open(folder / name(number), "x", encoding="utf-8") as file:
                file.write(text)
            return number
        except FileExistsError:
            number += 1
