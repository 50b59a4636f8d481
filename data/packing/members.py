"""Convert a table row's values to sample members: file, caption, JSON."""

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
from urllib.parse import unquote

from gigabatch.data.decode.signatures import describe_bytes
from gigabatch.data.packing.tables import Row

MEMBERS = ("png", "jpg", "jpeg", "webp", "wav", "flac", "ogg", "mp3", "npy", "cls", "txt", "json")
"""Member types that may be packed. Pickle is excluded: loading it can run code."""
FILES = tuple(kind for kind in MEMBERS if kind not in ("txt", "json"))
"""Types of a row's file; `txt` is its caption and `json` its other columns."""
_MAGIC = (
    ("png", 0, b"\x89PNG"), ("jpg", 0, b"\xff\xd8\xff"), ("webp", 8, b"WEBP"), ("wav", 8, b"WAVE"),
    ("flac", 0, b"fLaC"), ("ogg", 0, b"OggS"), ("mp3", 0, b"ID3"), ("mp3", 0, b"\xff\xfb"),
    ("npy", 0, b"\x93NUMPY"),
)  # fmt: skip

_READABLE = (
    (("png", "jpg", "jpeg", "webp"), ("a PNG", "a JPEG", "a WebP")),
    (("wav", "flac", "ogg", "mp3"), ("a WAV", "a FLAC", "an Ogg file", "an MP3")),
    (("npy",), ("a NumPy array",)),
)
"""Types of files that the same decoder reads, and what `describe_bytes` calls them."""


class InvalidRow(Exception):
    """Raised for a row that must be corrected in the table; `skip_missing` does not apply to it."""


def relative_name(name: Any, folder: Path) -> str | None:
    """Validate a file name from a table and return it relative to `folder`; None if there is none.

    Raises:
        InvalidRow: if it is not text, is a URL, or points outside the folder.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise InvalidRow(f"file name {name!r} is not text")
    path = unquote(name.removeprefix("file://")) if name.startswith("file:///") else name
    if "://" in path:
        raise InvalidRow(f"{name!r} is a URL; download the file first")
    if ".." not in path.split("/"):
        if not path.startswith("/"):
            return path
        # A table may name the folder itself, or what a link to it points to.
        for parent in (str(folder), os.path.realpath(folder)):
            if path.startswith(parent.rstrip("/") + "/"):
                return path[len(parent) :].lstrip("/")
    raise InvalidRow(
        f"{name!r} is outside the folder {folder}; use a name inside it, or set --folder to a "
        "folder that contains the files"
    )


def file_problem(folder: Path, name: str | None) -> str | None:
    """Return why a row's file cannot be packed, without reading it; None if it can be."""
    if not name:
        return "no file name"
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
        return f"{name!r} is not a regular file"
    if not status.st_size:
        return f"{name!r} is empty"
    return None if os.access(path, os.R_OK) else f"no permission to read {name!r}"


def read_file(folder: Path, name: str) -> bytes | str:
    """Return a file's content, or the problem as text if it can no longer be read."""
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        return f"{name!r} cannot be read: {error.strerror or error}"


def extension(name: str | None) -> str | None:
    """Return a file name's extension in lower case; None if that type is not packed."""
    kind = os.path.splitext(name or "")[1][1:].lower()
    return kind if kind in FILES else None


def detect_type(data: bytes) -> str | None:
    """Return a file's type from its first bytes; None if unknown."""
    return next((kind for kind, at, magic in _MAGIC if data.startswith(magic, at)), None)


def content_problem(kind: str, data: bytes) -> str | None:
    """Return why a file's content cannot be of its type; None if it can be, or is unknown.

    A PNG called .jpg can be decoded; an HTML page or a GIF called .jpg cannot.
    """
    readable = next((names for kinds, names in _READABLE if kind in kinds), None)
    actual = describe_bytes(data)
    if readable is None or actual is None or actual in readable:
        return None
    return f"it is {actual}, not {' or '.join(readable)}"


def first_caption(value: Any) -> bytes | None:
    """Return the caption, or the first non-empty one of a list, as UTF-8; None if there is none.

    Raises:
        InvalidRow: if a caption is not text.
    """
    for caption in value if isinstance(value, list) else [value]:
        if caption is not None and not isinstance(caption, str):
            raise InvalidRow(f"caption {caption!r} is not text")
        if caption and caption.strip():
            return _utf8(caption)
    return None


def json_member(values: Row) -> bytes:
    """Return values as JSON in UTF-8.

    Raises:
        InvalidRow: if JSON cannot represent one of them.
    """
    try:
        return _utf8(json.dumps(_to_json(values), ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidRow(f"a value cannot be written as JSON: {error}") from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRow(f"a text is not valid Unicode: {error}") from error


def _to_json(value: Any) -> Any:
    """Convert a value to JSON types; NaN, which tables use for a missing value, becomes null."""
    if isinstance(value, dict):
        return {str(name): _to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal) else value


class NumericColumns:
    """Detects the columns of a CSV file whose values are all numbers; CSV has no types.

    Only values that JSON writes exactly as they appear count as numbers, so nothing is lost:
    `007`, `1.10`, and codes in a column that also contains `n/a` stay text.
    """

    def __init__(self, columns: Iterable[str]) -> None:
        self._numeric = set(columns)
        self._filled: set[str] = set()

    def observe(self, rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
        """Yield numbered rows unchanged and record which columns hold numbers."""
        for number, row in rows:
            for name in tuple(self._numeric):
                value = row.get(name)
                if value is not None:
                    self._filled.add(name)
                    if not _is_number(value):
                        self._numeric.remove(name)
            yield number, row

    def names(self) -> frozenset[str]:
        """Return the columns with at least one value and only numbers."""
        return frozenset(self._numeric & self._filled)


def _is_number(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return type(value) in (int, float) and math.isfinite(value) and json.dumps(value) == text
