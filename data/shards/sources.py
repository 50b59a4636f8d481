"""Read several indexed sets as one, by sample number: `source << 40 | row`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigabatch.data.decode.members import code_of
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.mixture import SAMPLE_BITS, from_sample_number, to_sample_number
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.shards.index import I64, Index
from gigabatch.data.shards.json_columns import holds_json
from gigabatch.data.shards.reader import DamagedMember, Reader

SOURCE_COLUMN = "source"
"""The column that every sample has: the number of its source."""
UNKNOWN_CODE = -1
"""The code of a value that a sample lacks."""


class Sources:
    """Reads samples of several indexes. Can be pickled until its first use.

    Args:
        indexes: The sources, in the order of their numbers.
        cache: Cache of remote shards; None uses this node's cache.
    """

    def __init__(self, indexes: Sequence[Index], cache: ShardCache | None = None) -> None:
        self.indexes = tuple(indexes)
        self.readers = [Reader(index, cache) for index in self.indexes]

    def read(self, numbers: I64, members: Sequence[str]) -> list[dict[str, bytes | DamagedMember]]:
        """Read some members of several samples.

        Args:
            numbers: int64 [n], sample numbers.
            members: Extensions; a sample may lack some.

        Returns:
            For each sample, extension -> bytes, for the members that it has.

        Raises:
            GigabatchError: if a shard cannot be read.
        """
        out: list[dict[str, bytes | DamagedMember]] = [{} for _ in numbers]
        for source, positions, rows in self._by_source(numbers):
            present = [m for m in members if m in self.indexes[source].members]
            raws = self.readers[source].read_batch(rows, present)
            for position, raw in zip(positions, raws, strict=True):
                out[position] = raw
        return out

    def keys(self, numbers: I64) -> list[str]:
        """Return the keys of samples, given their int64 [n] numbers."""
        out = [""] * len(numbers)
        for source, positions, rows in self._by_source(numbers):
            keys = self.indexes[source].values("key", rows)
            for position, key in zip(positions, keys, strict=True):
                out[position] = key
        return out

    def shards(self, numbers: I64) -> list[tuple[int, int]]:
        """Return the distinct (source, shard number) of samples, in order of first use."""
        distinct: dict[tuple[int, int], None] = {}
        for source, _, rows in self._by_source(numbers):
            starts = self.indexes[source].shard_starts
            for shard in np.searchsorted(starts, rows, side="right") - 1:
                distinct[source, int(shard)] = None
        return list(distinct)

    def shard_name(self, number: int) -> str:
        """Return the path or URL of the shard that contains a sample."""
        source, row = self.source_and_row(number)
        index = self.indexes[source]
        return index.shards[index.shard_of(row)].name

    def where(self, number: int) -> str:
        """Return the shard and key of a sample, for messages."""
        source, row = self.source_and_row(number)
        return self.indexes[source].where(row)

    @staticmethod
    def source_and_row(number: int) -> tuple[int, int]:
        """Split one sample number into its source and its row in that source's index."""
        # `from_sample_number` does the same for arrays, which cost more for one number.
        return number >> SAMPLE_BITS, number & ((1 << SAMPLE_BITS) - 1)

    def prefetch(self, numbers: I64) -> None:
        """Start fetching the remote shards of samples."""
        for source, shard in self.shards(numbers):
            info = self.indexes[source].shards[shard]
            if is_remote(info.name):
                self.readers[source].cache.prefetch(info.name, info.bytes, info.version)

    @property
    def remote(self) -> bool:
        """Whether a source is on remote storage."""
        return any(is_remote(index.shards[0].name) for index in self.indexes)

    def _by_source(self, numbers: I64) -> list[tuple[int, list[int], I64]]:
        """Group sample numbers: (source, positions in `numbers`, rows int64)."""
        sources, rows = from_sample_number(np.asarray(numbers, np.int64))
        if len(self.indexes) == 1:
            return [(0, list(range(len(rows))), rows)]
        return [
            (int(s), np.flatnonzero(sources == s).tolist(), rows[sources == s])
            for s in np.unique(sources)
        ]

    def close(self) -> None:
        """Close all shards."""
        for reader in self.readers:
            reader.close()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def indexed_codes(index: Index, column: str, rows: I64 | None = None) -> NDArray[np.int64]:
    """Return the integer codes of an indexed json field.

    Args:
        index: The index.
        column: Name of the field.
        rows: int64 [n], rows of the index; None selects all.

    Returns:
        int64 [n]; UNKNOWN_CODE where the field is null.

    Raises:
        GigabatchError: if the index lacks the field.
    """
    if column not in index.columns:
        raise GigabatchError(
            f"{index.source}: the index has no column {column!r}. Add it with "
            f"`gigabatch data index {index.source} --columns {column}`."
        )
    # JSON text represents its value: the code must equal that of an index without the column.
    parse = json.loads if holds_json(index.table.field(column)) else lambda value: value
    if rows is not None:
        values = index.values(column, rows)
        codes = [UNKNOWN_CODE if v is None else code_of(parse(v)) for v in values]
        return np.array(codes, np.int64)
    parts = []
    for chunk in index.table[column].chunks:
        encoded = chunk.dictionary_encode()
        codes = [code_of(parse(value)) for value in encoded.dictionary.to_pylist()]
        indices = encoded.indices.fill_null(len(codes))
        buffer = indices.buffers()[1]
        code_indices = np.frombuffer(buffer, np.int32, len(indices), 4 * indices.offset)
        parts.append(np.array([*codes, UNKNOWN_CODE], np.int64)[code_indices])
    return np.concatenate(parts)


def source_sample_numbers(source: int, rows: I64) -> I64:
    """Return the sample numbers of some rows of one source, int64 [n]."""
    return to_sample_number(np.full(len(rows), source), rows)
