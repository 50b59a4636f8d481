"""Values of a table's row to members of a webdataset sample: file, caption, json."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from gigabatch.data.packing.tables import Row

MEMBERS = ("png", "jpg", "jpeg", "webp", "wav", "flac", "ogg", "mp3", "npy", "cls", "txt", "json")
"""The types of members that are packed. No pickle is among them."""
FILES = tuple(kind for kind in MEMBERS if kind not in ("txt", "json"))
"""Those that a row's file may have: the other two are its caption and its other columns."""
_MAGIC = (
    ("png", 0, b"\x89PNG"), ("jpg", 0, b"\xff\xd8\xff"), ("webp", 8, b"WEBP"), ("wav", 8, b"WAVE"),
    ("flac", 0, b"fLaC"), ("ogg", 0, b"OggS"), ("mp3", 0, b"ID3"), ("mp3", 0, b"\xff\xfb"),
    ("npy", 0, b"\x93NUMPY"),
)  # fmt: skip


class Wrong(Exception):
    """What is wrong with a row, and is never skipped: the table must be mended."""


def file_inside(name: Any) -> str | None:
    """A file's name as a table has it. Raises Wrong for one that leads out of the folder."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise Wrong(f"names its file by {name!r}, which is no text")
    if "://" in name:
        raise Wrong(f"{name!r} is a URL; fetch the file first")
    if name.startswith("/") or ".." in name.split("/"):
        raise Wrong(f"{name!r} leads out of the folder; name files relative to it")
    return name


def look_at_file(folder: Path, name: str | None) -> str | None:
    """What a row lacks in its file, told without reading it; None where all is well."""
    if not name:
        return "names no file"
    if extension(name) is None:
        return f"{name!r} is not of a known type ({', '.join(FILES)})"
    path = folder / name
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return f"{name!r} is missing"
    except (OSError, ValueError) as error:
        return f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}"
    if not stat.S_ISREG(status.st_mode):
        return f"{name!r} is no file"
    if not status.st_size:
        return f"{name!r} is empty"
    return None if os.access(path, os.R_OK) else f"{name!r} may not be read"


def read_file(folder: Path, name: str) -> bytes | str:
    """The bytes of a file that was looked at, or what is wrong with it now."""
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        return f"{name!r} cannot be read: {error.strerror or error}"


def extension(name: str | None) -> str | None:
    """The type of a file by its name, in lower case; None for one that is not packed."""
    kind = os.path.splitext(name or "")[1][1:].lower()
    return kind if kind in FILES else None


def kind_of_bytes(data: bytes) -> str | None:
    """The type of a file as its bytes begin."""
    return next((kind for kind, at, magic in _MAGIC if data.startswith(magic, at)), None)


def first_caption(value: Any) -> bytes | None:
    """The caption, or the first of several that is not empty, as it stands in the table."""
    for caption in value if isinstance(value, list) else [value]:
        if caption is not None and not isinstance(caption, str):
            raise Wrong(f"its caption is {caption!r}, which is no text")
        if caption and caption.strip():
            return _utf8(caption)
    return None


def json_member(values: Row) -> bytes:
    try:
        return _utf8(json.dumps(_plain(values), ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise Wrong(f"holds what json cannot: {error}") from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Wrong(f"holds text that is not Unicode: {error}") from error


def _plain(value: Any) -> Any:
    """Values as json has them. NaN, by which tables say "none", becomes null."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal) else value


class Numbers:
    """The columns of a CSV file where every value is a number: the format itself has no types.

    A number is what json writes as it was read, so that nothing is lost: `007`, `1.10` and a code
    of a column that also holds `n/a` stay text.
    """

    def __init__(self, columns: Iterable[str]) -> None:
        self._could = set(columns)
        self._some: set[str] = set()

    def watch(self, rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
        """Pass rows through, and learn."""
        for numbered in rows:
            for name in tuple(self._could):
                value = numbered[1].get(name)
                if value is not None:
                    self._some.add(name)
                    if not _is_number(value):
                        self._could.remove(name)
            yield numbered

    def found(self) -> frozenset[str]:
        return frozenset(self._could & self._some)


def _is_number(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return type(value) in (int, float) and math.isfinite(value) and json.dumps(value) == text
