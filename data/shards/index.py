"""The index of a set of shards: one row a sample, mapped into memory at run time.

A set is a folder of `*.tar`, a pattern (globs, brace ranges; local or remote), or a view, a folder
that `gigabatch data filter` made. Its index holds `samples.parquet` for interchange, an Arrow file
of the same rows (uncompressed, memory-mapped by every process) and `manifest.json`: the shards with
their sizes, versions and digests. It lies in `FOLDER/.gigabatch`, or in the cache folder where that
cannot be written or the set is no local folder. The sample number is the row; shards that are
added later come after all others, so that a sample keeps its number.
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
"""Rows of a record batch: a row is found by a shift, and an index is written in little memory."""
FORGET_AFTER = 1 << 9
"""Look-ups after which the mapped pages are given back, so that memory stays small however large
the index; the system keeps them cached."""
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """`name`: a path or URL. `bytes`, `version`: what it was when it was indexed. `samples`: its
    rows. `digest`: SHA-256 of its members' names, sizes and checksums."""

    name: str
    bytes: int
    version: str
    samples: int
    digest: str


@dataclass(frozen=True)
class Index:
    """A memory-mapped index.

    `source`: the folder or pattern as it was given. `folder`: where the index itself lies.
    `digest`: SHA-256 over the shards' digests, the data's fingerprint.
    """

    source: str
    folder: Path
    arrow: str
    shards: tuple[Shard, ...]
    members_held: tuple[tuple[str, int], ...]
    settings: IndexSettings
    digest: str

    def __len__(self) -> int:
        return int(self.first_sample[-1])

    @property
    def name(self) -> str:
        """What the set is called in metrics: the last part of its folder or pattern."""
        return os.path.basename(self.source.rstrip("/")) or self.source

    @cached_property
    def shard_sizes(self) -> I64:
        """[shards] samples in each."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @cached_property
    def first_sample(self) -> I64:
        """[shards + 1] the sample number at which each shard starts."""
        return np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)

    @property
    def members(self) -> tuple[str, ...]:
        """The extensions found, such as ("json", "png", "txt")."""
        return tuple(name for name, _ in self.members_held)

    @cached_property
    def _mapped(self) -> _Mapped:
        return _Mapped(self.folder / self.arrow)

    @property
    def table(self) -> pa.Table:
        return self._mapped.table

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of the json member that the index holds."""
        return self.settings.columns

    def take(self, column: str, samples: I64) -> NDArray[Any]:
        """The values of a numeric column, such as `png.offset`, of the given samples."""
        return self._mapped.take(column, samples)

    def values(self, column: str, samples: I64) -> list[Any]:
        """The values of any column of the given samples, None for null."""
        return self._mapped.values(column, samples)

    def key(self, sample: int) -> str:
        return str(self.values("key", np.array([sample]))[0])

    def shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self.first_sample, sample, side="right")) - 1

    def where(self, sample: int) -> str:
        """Shard and key, for messages."""
        return f"{self.shards[self.shard_of(sample)].name}: sample {self.key(sample)!r}"

    def span(self, sample: int, member: str) -> tuple[int, int]:
        """(offset, size) of one member in its shard, in bytes; offset 0 means it is missing."""
        at = np.array([sample])
        return int(self.take(f"{member}.offset", at)[0]), int(self.take(f"{member}.size", at)[0])

    def lacking(self, *choices: str) -> I64:
        """The samples that have none of `choices` (extensions)."""
        held = dict(self.members_held)
        if any(held.get(choice) == len(self) for choice in choices):
            return np.empty(0, np.int64)
        lacking = np.ones(len(self), bool)
        for choice in choices:
            if choice in held:
                for first in range(0, len(self), ROWS):
                    rows = np.arange(first, min(first + ROWS, len(self)))
                    lacking[rows] &= self.take(f"{choice}.offset", rows) == 0
        return np.flatnonzero(lacking)

    def require(self, *choices: str, partial: bool = False) -> tuple[str, ...]:
        """Those of `choices` (extensions) that occur, in their order.

        Raises GigabatchError where none does, or, unless `partial`, where a sample has none.
        """
        found = tuple(choice for choice in choices if choice in self.members)
        if not found:
            raise GigabatchError(
                f"{self.source}: no sample has a .{' or .'.join(choices)} member; found: "
                f"{', '.join('.' + m for m in self.members)}. Is data.train the set you meant?"
            )
        missing = np.empty(0, np.int64) if partial else self.lacking(*found)
        if missing.size:
            raise GigabatchError(
                f"{self.where(int(missing[0]))} has no .{' or .'.join(found)} member "
                f"({missing.size} of {len(self)} samples lack one). Write the shards again with "
                "every member present, or say data.missing=mask."
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description, not the mapped table: each process maps it itself."""
        mapped = ("_mapped", "first_sample", "shard_sizes")
        return {k: v for k, v in self.__dict__.items() if k not in mapped}


@dataclass
class _Mapped:
    """The Arrow file, in record batches of ROWS rows."""

    path: Path
    table: pa.Table = field(init=False)

    def __post_init__(self) -> None:
        with open(self.path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self.map))).read_all()
        self.numbers: dict[str, list[NDArray[Any]]] = {}
        self.looked_up = 0

    def take(self, column: str, samples: I64) -> NDArray[Any]:
        batches = self._numbers(column)
        self._count(len(samples))
        if len(batches) == 1:
            return batches[0][samples]
        out = np.empty(len(samples), batches[0].dtype)
        which = samples >> BATCH_BITS
        for batch in np.unique(which):
            here = which == batch
            out[here] = batches[batch][samples[here] & (ROWS - 1)]
        return out

    def values(self, column: str, samples: I64) -> list[Any]:
        chunks = self.table[column].chunks
        self._count(len(samples))
        return [chunks[s >> BATCH_BITS][s & (ROWS - 1)].as_py() for s in samples.tolist()]

    def _numbers(self, column: str) -> list[NDArray[Any]]:
        """Without a copy. (pyarrow's own `to_numpy` imports pandas, for seconds, and swallows a
        Ctrl-C meanwhile.)"""
        if column not in self.numbers:
            kind = self.table.schema.field(column).type.to_pandas_dtype()
            wide = np.dtype(kind).itemsize
            self.numbers[column] = [
                np.frombuffer(c.buffers()[1], kind, len(c), wide * c.offset)
                for c in self.table[column].chunks
            ]
        return self.numbers[column]

    def _count(self, look_ups: int) -> None:
        self.looked_up += look_ups
        if self.looked_up > FORGET_AFTER:
            self.looked_up = 0
            self.map.madvise(mmap.MADV_DONTNEED)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole index; empty where there is none, or part of one is missing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        rows = sum(shard["samples"] for shard in manifest["shards"])
        whole = (
            manifest["format"] == FORMAT
            and rows == _Mapped(folder / manifest["arrow"]).table.num_rows
        )
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowInvalid):
        return {}
    return manifest if whole else {}


def index_of(source: str, folder: Path, manifest: dict[str, Any], names: Sequence[str]) -> Index:
    """The Index that a manifest describes; `names`: the shards' paths or URLs, in its order."""
    shards = tuple(
        Shard(name, s["bytes"], s["version"], s["samples"], s["digest"])
        for name, s in zip(names, manifest["shards"], strict=True)
    )
    held = tuple(manifest["members"].items())
    settings = IndexSettings.model_validate(manifest["settings"])
    return Index(source, folder, manifest["arrow"], shards, held, settings, manifest["digest"])


def cache_home() -> Path:
    """$GIGABATCH_CACHE, or `gigabatch` in $XDG_CACHE_HOME, or in ~/.cache."""
    if own := os.environ.get("GIGABATCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gigabatch"
