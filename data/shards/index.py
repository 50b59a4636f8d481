"""The index of a set of shards: one row per sample, memory-mapped at run time.

A set is a folder of `*.tar` files, a pattern (globs and brace ranges, local or remote), or a
filtered view, which is a folder that `gigabatch data filter` wrote. The files of its index are:

- `samples.parquet`: the rows, for your own use.
- `samples-DIGEST.arrow`: the same rows, uncompressed; every process maps it into memory.
- `manifest.json`: the shards with their sizes, versions and digests.

They are stored in `FOLDER/.gigabatch`, or in the cache folder if that cannot be written or the set
is not a local folder. Shards added later are indexed after all others, so a sample keeps its row.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.scan import IndexSettings

FORMAT = 2
BATCH_BITS = 20
ROWS = 1 << BATCH_BITS
"""Number of rows in a record batch: a power of two, so that a shift gives a row's batch, and few
enough that writing an index needs little memory."""
LOOKUPS_PER_RELEASE = 1 << 9
"""Number of lookups after which the mapped pages are released, so that the process stays small for
any size of index. The kernel keeps the pages in its cache."""
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """One indexed shard.

    Attributes:
        name: Its path or URL.
        bytes: Its size when it was indexed.
        version: Its modification time or ETag when it was indexed.
        samples: Number of its rows.
        digest: SHA-256 of its members' names, sizes and checksums.
    """

    name: str
    bytes: int
    version: str
    samples: int
    digest: str


@dataclass(frozen=True)
class Index:
    """A memory-mapped index.

    Attributes:
        source: The folder or pattern that was indexed.
        folder: Folder of the index files.
        arrow: Name of the Arrow file.
        shards: The shards, in the order of their rows.
        member_counts: (extension, samples that have it) of every kind of member.
        settings: Content of the index.
        digest: SHA-256 over the shards' digests, the fingerprint of the data.
    """

    source: str
    folder: Path
    arrow: str
    shards: tuple[Shard, ...]
    member_counts: tuple[tuple[str, int], ...]
    settings: IndexSettings
    digest: str

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def name(self) -> str:
        """The set's name in metrics: the last part of its folder or pattern."""
        return os.path.basename(self.source.rstrip("/")) or self.source

    @cached_property
    def shard_sizes(self) -> I64:
        """Number of samples in every shard, int64 [shards]."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @cached_property
    def shard_starts(self) -> I64:
        """Row at which every shard starts, then the number of rows; int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)

    @property
    def members(self) -> tuple[str, ...]:
        """The extensions that occur, such as ("json", "png", "txt")."""
        return tuple(name for name, _ in self.member_counts)

    @cached_property
    def _mapped(self) -> _MappedTable:
        return _MappedTable(self.folder / self.arrow)

    @property
    def table(self) -> pa.Table:
        """All rows, memory-mapped."""
        return self._mapped.table

    @property
    def columns(self) -> tuple[str, ...]:
        """The indexed fields of the json member."""
        return self.settings.columns

    def take(self, column: str, rows: I64) -> NDArray[Any]:
        """Return a numeric column, such as `png.offset`, at some rows; [len(rows)]."""
        return self._mapped.take(column, rows)

    def values(self, column: str, rows: I64) -> list[Any]:
        """Return the values of any column at some rows; None for null."""
        return self._mapped.values(column, rows)

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        return str(self.values("key", np.array([row]))[0])

    def shard_of(self, row: int) -> int:
        """Return the number of the shard that contains a sample."""
        return int(np.searchsorted(self.shard_starts, row, side="right")) - 1

    def where(self, row: int) -> str:
        """Return the shard and key of a sample, for messages."""
        return f"{self.shards[self.shard_of(row)].name}: sample {self.key(row)!r}"

    def member_span(self, row: int, member: str) -> tuple[int, int]:
        """Return (offset, size) of a member in its shard, in bytes; offset 0 if it is missing."""
        rows = np.array([row])
        return int(self.take(f"{member}.offset", rows)[0]), int(
            self.take(f"{member}.size", rows)[0]
        )

    def samples_without(self, *choices: str) -> I64:
        """Return the rows of the samples that have none of `choices` (extensions), int64 [n]."""
        counts = dict(self.member_counts)
        if any(counts.get(choice) == len(self) for choice in choices):
            return np.empty(0, np.int64)
        without = np.ones(len(self), bool)
        for choice in choices:
            if choice in counts:
                for first in range(0, len(self), ROWS):
                    rows = np.arange(first, min(first + ROWS, len(self)))
                    without[rows] &= self.take(f"{choice}.offset", rows) == 0
        return np.flatnonzero(without)

    def samples_with_several(self, *members: str) -> int:
        """Return the number of samples that have more than one of `members` (extensions)."""
        present = [member for member in members if member in self.members]
        several = 0
        for first in range(0, len(self) if len(present) > 1 else 0, ROWS):
            rows = np.arange(first, min(first + ROWS, len(self)))
            of_sample = sum((self.take(f"{m}.offset", rows) != 0).astype(np.int64) for m in present)
            several += int(np.count_nonzero(of_sample > 1))
        return several

    def require_members(
        self, *choices: str, allow_missing: bool = False, key: str | None = None
    ) -> tuple[str, ...]:
        """Return the extensions in `choices` that occur in the set, in the order of `choices`.

        Args:
            choices: Alternative extensions of one modality.
            allow_missing: Accept samples that have none of them.
            key: Config key that names the member, for errors.

        Raises:
            GigabatchError: if no sample has any of them, or if a sample has none and
                `allow_missing` is false.
        """
        present = tuple(choice for choice in choices if choice in self.members)
        if not present:
            fix = f", or set {key} to where it is" if key else ""
            if key == "data.captions.field":
                fix = f", or set {key} to the json field of the captions" * ("json" in self.members)
            raise GigabatchError(
                f"{self.source}: no sample has a .{' or .'.join(choices)} member; the members are: "
                f"{', '.join('.' + m for m in self.members)}. Check that data.train names the "
                f"intended set{fix}."
            )
        missing = np.empty(0, np.int64) if allow_missing else self.samples_without(*present)
        if missing.size:
            raise GigabatchError(
                f"{self.where(int(missing[0]))} has no .{' or .'.join(present)} member "
                f"({missing.size} of {len(self)} samples lack one). Rewrite the shards with "
                "every member present, or set data.missing=mask."
            )
        return present

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description without the mapped table, which each process maps itself."""
        cached = ("_mapped", "shard_starts", "shard_sizes")
        return {k: v for k, v in self.__dict__.items() if k not in cached}


@dataclass
class _MappedTable:
    """The Arrow file of an index, in record batches of ROWS rows."""

    path: Path
    table: pa.Table = field(init=False)

    def __post_init__(self) -> None:
        with open(self.path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self.map))).read_all()
        self.arrays: dict[str, list[NDArray[Any]]] = {}
        self.lookups = 0

    def take(self, column: str, rows: I64) -> NDArray[Any]:
        batches = self._arrays(column)
        self._count_lookups(len(rows))
        if len(batches) == 1:
            return batches[0][rows]
        out = np.empty(len(rows), batches[0].dtype)
        batch_of_row = rows >> BATCH_BITS
        for batch in np.unique(batch_of_row):
            here = batch_of_row == batch
            out[here] = batches[batch][rows[here] & (ROWS - 1)]
        return out

    def values(self, column: str, rows: I64) -> list[Any]:
        chunks = self.table[column].chunks
        self._count_lookups(len(rows))
        return [chunks[r >> BATCH_BITS][r & (ROWS - 1)].as_py() for r in rows.tolist()]

    def _arrays(self, column: str) -> list[NDArray[Any]]:
        """Return a numeric column as one array per record batch, without a copy."""
        # Not pyarrow's `to_numpy`: it imports pandas, which takes seconds and swallows Ctrl-C.
        if column not in self.arrays:
            kind = self.table.schema.field(column).type.to_pandas_dtype()
            itemsize = np.dtype(kind).itemsize
            self.arrays[column] = [
                np.frombuffer(c.buffers()[1], kind, len(c), itemsize * c.offset)
                for c in self.table[column].chunks
            ]
        return self.arrays[column]

    def _count_lookups(self, count: int) -> None:
        self.lookups += count
        if self.lookups > LOOKUPS_PER_RELEASE:
            self.lookups = 0
            self.map.madvise(mmap.MADV_DONTNEED)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete index; {} if there is none or a file is missing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        rows = sum(shard["samples"] for shard in manifest["shards"])
        complete = (
            manifest["format"] == FORMAT
            and rows == _MappedTable(folder / manifest["arrow"]).table.num_rows
        )
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowInvalid):
        return {}
    return manifest if complete else {}


def index_from_manifest(
    source: str, folder: Path, manifest: dict[str, Any], names: Sequence[str]
) -> Index:
    """Return the index that a manifest describes.

    Args:
        source: The folder or pattern that was indexed.
        folder: Folder of the index files.
        manifest: Contents of `manifest.json`.
        names: Paths or URLs of the shards, in the manifest's order.
    """
    shards = tuple(
        Shard(name, s["bytes"], s["version"], s["samples"], s["digest"])
        for name, s in zip(names, manifest["shards"], strict=True)
    )
    counts = tuple(manifest["members"].items())
    settings = IndexSettings.model_validate(manifest["settings"])
    return Index(source, folder, manifest["arrow"], shards, counts, settings, manifest["digest"])


def cache_folder() -> Path:
    """Return $GIGABATCH_CACHE, or else `gigabatch` in $XDG_CACHE_HOME or in ~/.cache."""
    if folder := os.environ.get("GIGABATCH_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gigabatch"
