"""Read several indexed sets as one, by sample number: `source << 40 | row`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gigabatch.data.decode.ids import (
    OLD_UNKNOWN_CODE,
    FieldsVersion,
    code_of,
    is_missing,
    old_code_of,
    unknown_code,
)
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.mixture import SAMPLE_BITS, from_sample_number, to_sample_number
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.shards.index import I64, Index
from gigabatch.data.shards.json_columns import holds_json
from gigabatch.data.shards.reader import DamagedMember, Reader

SOURCE_COLUMN = "source"
"""The column that every sample has: the number of its source."""


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


def indexed_values(index: Index, column: str, rows: Sequence[int]) -> list[Any]:
    """Return the json values of an indexed field at some rows; None where it is null.

    Raises:
        GigabatchError: if the index lacks the field.
    """
    values = index.values(column, np.array(rows, np.int64))
    if holds_json(_column_field(index, column)):
        return [None if value is None else json.loads(value) for value in values]
    return values


def indexed_codes(
    index: Index, column: str, source: int = 0, version: FieldsVersion = 2
) -> NDArray[np.int64]:
    """Return the codes of an indexed json field, which equal those of an index without it.

    Args:
        index: The index.
        column: Name of the field.
        source: Number of the source, for the codes of samples without a value.
        version: Meaning of the values.

    Returns:
        int64 [n]. A sample without a value has a code that no other sample has; in version 1,
        OLD_UNKNOWN_CODE if the field is null.

    Raises:
        GigabatchError: if the index lacks the field.
    """
    codes, known = [np.empty(0, np.int64)], [np.empty(0, bool)]
    code = old_code_of if version == 1 else code_of
    lacks = (lambda value: value is None) if version == 1 else is_missing
    for values, indices in _dictionaries(index, column):
        known.append(np.array([not lacks(value) for value in values], bool)[indices])
        codes.append(
            np.array([0 if lacks(value) else code(value) for value in values], np.int64)[indices]
        )
    unknown = np.full(len(index), OLD_UNKNOWN_CODE)
    if version != 1:
        unknown = unknown_code(0) - source_sample_numbers(source, np.arange(len(index)))
    return np.where(np.concatenate(known), np.concatenate(codes), unknown)


def rows_without_value(index: Index, column: str) -> I64:
    """Return the rows of the samples for which an indexed json field has no value, int64 [n]."""
    missing = [np.empty(0, bool)]
    for values, indices in _dictionaries(index, column):
        missing.append(np.array([is_missing(value) for value in values], bool)[indices])
    return np.flatnonzero(np.concatenate(missing))


def _dictionaries(index: Index, column: str) -> Iterator[tuple[list[Any], NDArray[np.int32]]]:
    """Yield each chunk's distinct json values, the last None, and the value of every row."""
    # JSON text represents its value: the code must equal that of an index without the column.
    is_json = holds_json(_column_field(index, column))
    for chunk in index.table[column].chunks:
        encoded = chunk.dictionary_encode()
        values = encoded.dictionary.to_pylist()
        indices = encoded.indices.fill_null(len(values))
        buffer = np.frombuffer(indices.buffers()[1], np.int32, len(indices), 4 * indices.offset)
        yield [*(map(json.loads, values) if is_json else values), None], buffer


def _column_field(index: Index, column: str) -> pa.Field:
    if column not in index.columns:
        raise GigabatchError(
            f"{index.source}: the index has no column {column!r}. Add it with "
            f"`gigabatch data index {index.source} --columns {column}`."
        )
    return index.table.field(column)


def source_sample_numbers(source: int, rows: I64) -> I64:
    """Return the sample numbers of some rows of one source, int64 [n]."""
    return to_sample_number(np.full(len(rows), source), rows)
