"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write beside, sync, then rename over `path`."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"


def create_numbered(folder: Path, name: Callable[[int], str], text: str) -> int:
    """Create the first of `name(1)`, `name(2)`, ... that does not exist; its number. Exclusive:
    no two callers get the same one."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            with open(folder / name(number), "x", encoding="utf-8") as file:
                file.write(text)
            return number
        except FileExistsError:
            number += 1
