"""Advise on sources that are not shards yet: tables, zip files and folders of images."""

from __future__ import annotations

import glob
import os
import re
import shlex
from itertools import chain, islice
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.locations import is_remote

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather")
"""Tables that `gigabatch data pack` reads."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
LIST_IMAGES = (
    "List them in a table with the columns file and caption, then write shards with `gigabatch "
    "data pack TABLE OUT`."
)
ENTRIES = 10_000
"""Maximum number of folder entries inspected to determine what the folder holds."""
ZIP = (
    "This is a zip file, not .tar shards. Unzip it, then write shards with `gigabatch data pack "
    "TABLE OUT`, where TABLE lists the files and their captions."
)


def pack_hint(source: str) -> str | None:
    """Return advice on how to make shards from a table, a pattern, a zip file or a folder.

    Args:
        source: Path, pattern or URL.

    Returns:
        Sentences that name `gigabatch data pack`; None for any other source, such as a folder of
        .tar shards, a filtered view or a path that does not exist.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if "://" in source:
        return _remote_hint(suffix)
    if os.path.isdir(source):
        return _folder_hint(path)
    if os.path.exists(source):
        if suffix in IMAGES:
            return f"This is an image file, not .tar shards. {LIST_IMAGES}"
        return ZIP if suffix == ".zip" else _table_hint(suffix, path, "a table")
    if any(mark in source for mark in "*?[{"):
        return _pattern_hint(source)
    return None


def check_root(root: str) -> None:
    """Check that `data.root` is a URL or a folder; a demo set is not checked here.

    Raises:
        GigabatchError: if it is neither.
    """
    is_folder = os.path.isdir(root)  # `Path.is_dir` raises for a path that is too long
    hint = None if is_folder else pack_hint(root)
    if hint or not (is_folder or is_remote(root)):
        hint = hint or "Set it to a folder of shards."
        raise GigabatchError(f"data.root: {root} is not a folder. {hint}")


def _pattern_hint(pattern: str) -> str | None:
    """Return the hint for a pattern, from its suffix, `.{jpg,png}` included, or its first match."""
    ends = pattern.lower().rpartition(".")[2]
    suffixes = [f".{end}" for end in re.findall(r"[a-z]+", ends)]
    if not any(suffix in (*SUFFIXES, *IMAGES, ".tar", ".zip") for suffix in suffixes):
        suffixes = [Path(next(glob.iglob(pattern), "")).suffix.lower()]
    if any(suffix in IMAGES for suffix in suffixes):
        return f"This is a pattern of image files, not .tar shards. {LIST_IMAGES}"
    if ".zip" in suffixes:
        return ZIP
    tables = [suffix for suffix in suffixes if suffix in SUFFIXES]
    return _table_hint(tables[0], Path(pattern), "a pattern of tables") if tables else None


def _folder_hint(folder: Path) -> str | None:
    """Return the hint for a folder, from the types of its files and of those in its subfolders."""
    if (folder / "manifest.json").exists():  # a filtered view, whose index is a Parquet file
        return None
    entries = islice(chain(folder.glob("[!.]*"), folder.glob("[!.]*/[!.]*")), ENTRIES)
    first: dict[str, Path] = {}
    for entry in entries:
        first.setdefault(entry.suffix.lower(), entry)
    if ".tar" in first:
        return None
    for suffix in SUFFIXES:
        if suffix in first:
            return _table_hint(suffix, first[suffix].parent, "a folder of tables")
    if ".zip" in first:
        return ZIP
    if any(suffix in first for suffix in IMAGES):
        return f"This is a folder of image files, not .tar shards. {LIST_IMAGES}"
    return None


def _table_hint(suffix: str, source: Path, kind: str) -> str | None:
    if suffix not in SUFFIXES:
        return None
    return (
        f"This is {kind} ({suffix}), not .tar shards. Write shards first: `gigabatch data pack "
        f"{shlex.quote(str(source))} OUT`."
    )


def _remote_hint(suffix: str) -> str | None:
    if suffix in IMAGES:
        return f"This names {suffix} files, not .tar shards. Download them. {LIST_IMAGES}"
    if suffix not in (*SUFFIXES, ".zip"):
        return None
    return (
        f"This names {suffix} files, not .tar shards. Download them, then write shards with "
        "`gigabatch data pack FOLDER OUT`."
    )
