"""Several indexed sets read as one, by sample number: `source << 40 | sample`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigabatch.data.decode.members import code_of
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.mixture import NUMBER_BITS, number_of, split_number
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.shards.index import I64, Index
from gigabatch.data.shards.json_columns import is_json
from gigabatch.data.shards.reader import Damaged, Reader

SOURCE = "source"
"""The column that every sample has: which source it is of."""
UNKNOWN = -1
"""The code of a value that a sample lacks."""


class Sources:
    """Reads from several indexes. Picklable until first used; one process each."""

    def __init__(self, indexes: Sequence[Index], cache: ShardCache | None = None) -> None:
        self.indexes = tuple(indexes)
        self.readers = [Reader(index, cache) for index in self.indexes]

    def read(self, numbers: I64, members: Sequence[str]) -> list[dict[str, bytes | Damaged]]:
        """For each sample, those of `members` that it has."""
        out: list[dict[str, bytes | Damaged]] = [{} for _ in numbers]
        for source, rows, samples in self._by_source(numbers):
            held = [m for m in members if m in self.indexes[source].members]
            for row, raw in zip(rows, self.readers[source].read_batch(samples, held), strict=True):
                out[row] = raw
        return out

    def keys(self, numbers: I64) -> list[str]:
        out = [""] * len(numbers)
        for source, rows, samples in self._by_source(numbers):
            for row, key in zip(rows, self.indexes[source].values("key", samples), strict=True):
                out[row] = key
        return out

    def shards(self, numbers: I64) -> list[tuple[int, int]]:
        """The distinct (source, shard) of some samples, in the order of their first use."""
        found: dict[tuple[int, int], None] = {}
        for source, _, samples in self._by_source(numbers):
            first = self.indexes[source].first_sample
            for shard in np.searchsorted(first, samples, side="right") - 1:
                found[source, int(shard)] = None
        return list(found)

    def shard_name(self, number: int) -> str:
        source, sample = self.place(number)
        index = self.indexes[source]
        return index.shards[index.shard_of(sample)].name

    def where(self, number: int) -> str:
        """Shard and key, for messages."""
        source, sample = self.place(number)
        return self.indexes[source].where(sample)

    @staticmethod
    def place(number: int) -> tuple[int, int]:
        """(source, sample number in it) of one number, without the cost of an array."""
        return number >> NUMBER_BITS, number & ((1 << NUMBER_BITS) - 1)

    def prefetch(self, numbers: I64) -> None:
        """Begin to fetch the remote shards of these samples."""
        for source, shard in self.shards(numbers):
            of = self.indexes[source].shards[shard]
            if is_remote(of.name):
                self.readers[source].cache.prefetch(of.name, of.bytes, of.version)

    @property
    def remote(self) -> bool:
        return any(is_remote(index.shards[0].name) for index in self.indexes)

    def _by_source(self, numbers: I64) -> list[tuple[int, list[int], I64]]:
        sources, samples = split_number(np.asarray(numbers, np.int64))
        if len(self.indexes) == 1:
            return [(0, list(range(len(samples))), samples)]
        return [
            (int(s), np.flatnonzero(sources == s).tolist(), samples[sources == s])
            for s in np.unique(sources)
        ]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def indexed_codes(index: Index, column: str, samples: I64 | None = None) -> NDArray[np.int64]:
    """int64 codes of an indexed field, of some samples or of all; UNKNOWN where it is null.

    Raises GigabatchError where the index does not hold the field.
    """
    if column not in index.columns:
        raise GigabatchError(
            f"{index.source}: the index holds no column {column!r}. Bring it in with "
            f"`gigabatch data index {index.source} --columns {column}`."
        )
    # JSON text stands for its value, whose code must be that of an index without the column.
    value = json.loads if is_json(index.table.field(column)) else lambda value: value
    if samples is not None:
        values = index.values(column, samples)
        codes = [UNKNOWN if v is None else code_of(value(v)) for v in values]
        return np.array(codes, np.int64)
    parts = []
    for chunk in index.table[column].chunks:
        coded = chunk.dictionary_encode()
        codes = [code_of(value(each)) for each in coded.dictionary.to_pylist()]
        places = coded.indices.fill_null(len(codes))
        at = np.frombuffer(places.buffers()[1], np.int32, len(places), 4 * places.offset)
        parts.append(np.array([*codes, UNKNOWN], np.int64)[at])
    return np.concatenate(parts)


def renumber(source: int, samples: I64) -> I64:
    """Sample numbers of a source's samples."""
    return number_of(np.full(len(samples), source), samples)
