"""Name data beside shards that a run does not read, and shards of several splits in one folder.

Harmless files are not named: tables, json and text files lie beside the shards of img2dataset.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

ENTRIES = 1_000
"""Maximum number of entries inspected in the subfolders of a folder."""
_UNPACKERS = {
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.zst": "zstd -d --rm", ".tzst": "zstd -d --rm",
    ".tar.bz2": "bunzip2", ".tbz2": "bunzip2", ".tar.xz": "unxz", ".txz": "unxz",
    ".tar.lz4": "lz4 -d --rm",
}  # fmt: skip
_ARCHIVES = (".zip", ".7z", ".rar")
_UNFINISHED = re.compile(r"\.tar\.(part|partial|tmp|temp|download|crdownload|incomplete|aria2)$")
_SUSPECT = re.compile(r"\.(tar|tgz|tzst|tbz2|txz|zip|7z|rar)", re.IGNORECASE)
_SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation",
    "validation": "validation", "dev": "validation", "devset": "validation",
    "minival": "validation", "heldout": "validation", "holdout": "validation", "test": "test",
    "testing": "test", "testset": "test", "tst": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def unread_data(names: Sequence[str], folder: str | None = None) -> list[str]:
    """Describe files that hold data but are not read, each with a remedy.

    Args:
        names: Names of the files in a folder of shards.
        folder: The folder, if it is local; shards in its subfolders are named too.

    Returns:
        One phrase per kind of file; empty if everything is read.
    """
    suspects = sorted(name for name in names if _SUSPECT.search(name) and name[0] != ".")
    lower = {name: name.lower() for name in suspects}
    phrases = []
    for suffix, unpacker in _UNPACKERS.items():
        compressed = [name for name, low in lower.items() if low.endswith(suffix)]
        phrases += _phrase(
            compressed, "compressed shard", "compressed shards", f"unpack with `{unpacker}`"
        )
    upper = [name for name, low in lower.items() if low.endswith(".tar") and name[-4:] != ".tar"]
    phrases += _phrase(upper, "shard", "shards", "rename to end in .tar")
    archives = [name for name, low in lower.items() if low.endswith(_ARCHIVES)]
    phrases += _phrase(archives, "archive", "archives", "unpack, then use `gigabatch data pack`")
    unfinished = [name for name, low in lower.items() if _UNFINISHED.search(low)]
    phrases += _phrase(unfinished, "unfinished download", "unfinished downloads", "download again")
    if folder is not None:
        deeper = list(islice(_shards_below(folder), ENTRIES))
        phrases += _phrase(
            deeper,
            "shard in a subfolder",
            "shards in subfolders",
            _subfolder_remedy(folder, deeper),
        )
    return phrases


def _subfolder_remedy(folder: str, shards: Sequence[str]) -> str:
    """Return how to read shards below a folder, without merging splits."""
    if folders := folders_by_split(f"{folder}/{name}" for name in shards):
        first = next(iter(folders.values()))[0]
        return f"the subfolders hold several splits; name one of them, such as {shlex.quote(first)}"
    return f"the pattern {shlex.quote(f'{folder}/**/*.tar')} reads all"


def folders_by_split(shards: Iterable[str]) -> dict[str, list[str]]:
    """Return split -> folders of its shards; empty unless the folders state several splits."""
    splits: dict[str, list[str]] = {}
    for folder in sorted({os.path.dirname(shard) for shard in shards}):
        if split := split_of(folder):
            splits.setdefault(split, []).append(folder)
    return splits if len(splits) > 1 else {}


def _phrase(names: Sequence[str], singular: str, plural: str, remedy: str) -> list[str]:
    if not names:
        return []
    count = f"1 {singular} (" if len(names) == 1 else f"{len(names):,} {plural} (such as "
    return [f"{count}{names[0]}: {remedy})"]


def _shards_below(folder: str) -> Iterator[str]:
    """Yield the shards in the subfolders of a folder, relative to it, in the order of names."""
    seen = 0
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        seen += len(folders) + len(files)
        if path != folder:
            for name in sorted(files):
                if name.lower().endswith(".tar") and not name.startswith("."):
                    yield os.path.relpath(os.path.join(path, name), folder)
        if seen > ENTRIES:
            return


_NO_DIGITS = str.maketrans("", "", "0123456789")


def split_of(name: str) -> str | None:
    """Return the split that a file's name states: train, validation or test; None if none.

    The first such word counts, as in `train-00000-of-00002.parquet` and `coco_val2017.csv`.
    """
    for word in re.split(r"[-_.\s]+", Path(name).name.lower()):
        if split := _SPLIT_WORDS.get(word.rstrip("0123456789")):
            return split
    return None


def files_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Return split -> names of its files; empty unless the names state several splits."""
    names = sorted(names)
    # Most sets have names that differ in their digits only; a set may have a million shards.
    if len({split_of(name) for name in {name.translate(_NO_DIGITS) for name in names}}) < 2:
        return {}
    splits: dict[str, list[str]] = {}
    for name in names:
        if split := split_of(name):
            splits.setdefault(split, []).append(os.path.basename(name))
    return splits if len(splits) > 1 else {}


def count_splits(splits: dict[str, list[str]]) -> str:
    """Return text such as "train (8 files), test (1 file)"."""
    counts = {split: len(names) for split, names in splits.items()}
    return ", ".join(f"{split} ({n} file{'s' * (n > 1)})" for split, n in counts.items())


def split_pattern(split: str, splits: dict[str, list[str]]) -> str:
    """Return a pattern, or a file's name, that matches the files of a split and of no other."""
    names = splits[split]
    if len(names) == 1:
        return names[0]
    first = _common_start(names)
    last = _common_start([name[len(first) :][::-1] for name in names])[::-1]
    others = [name for other, of_other in splits.items() if other != split for name in of_other]
    pattern = f"{first}*{last}"
    if any(fnmatch.fnmatchcase(name, pattern) for name in others):
        return "{" + ",".join(names) + "}"
    return pattern


def _common_start(texts: Sequence[str]) -> str:
    """Return the longest text with which all begin."""
    low, high = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:length]
