"""Compute statistics from an index: counts, sizes, equal members, values of fields.

Shards are read only to compare a few members that appear equal. Index columns are read in chunks;
at most eight bytes per sample are held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gigabatch.data.shards.index import I64, ROWS, Index
from gigabatch.data.shards.reader import Reader

TOP = 10
"""Number of most frequent values that are listed."""
MAX_DISTINCT = 100_000
"""Maximum number of distinct values that are counted separately."""
CHUNK = 1 << 17
"""Number of rows whose values are counted at a time."""
QUANTILES = (0.5, 0.95, 0.99)
GROUPS, COPIES = 5, 3
"""Number of groups of equal members that are listed, and of members compared in each."""
U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Distribution:
    """Count, sum, extremes and quantiles of numbers.

    A quantile is the smallest number that at least this share of the numbers does not exceed.
    """

    count: int
    total: float
    min: float
    median: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class Frequencies:
    """Frequencies of values.

    Attributes:
        count: Number of values.
        distinct: Number of distinct values that were counted separately.
        truncated: Whether there are more distinct values; `top` then covers only those counted.
        top: Most frequent values with their exact counts.
    """

    count: int
    distinct: int
    truncated: bool
    top: list[tuple[Any, int]]


@dataclass(frozen=True)
class Member:
    """Statistics of one kind of member.

    Attributes:
        name: Extension.
        samples: Number of samples with this member.
        missing: Number of samples without it.
        first_missing: Location of the first sample without it.
        bytes: Distribution of sizes in bytes.
    """

    name: str
    samples: int
    missing: int
    first_missing: str | None
    bytes: Distribution | None


@dataclass(frozen=True)
class Column:
    """Statistics of an indexed json field; `min` and `max` are None unless it is numeric."""

    name: str
    nulls: int
    values: Frequencies
    min: float | None
    max: float | None


@dataclass(frozen=True)
class Duplicates:
    """Samples whose member equals another sample's by CRC-32C and size.

    Attributes:
        samples: Number of samples with a member.
        repeated: Number of samples whose member equals another's.
        groups: Number of groups of equal members.
        chance_pairs: Expected number of different pairs with equal size and checksum.
        compared: Number of groups whose first members were compared byte by byte.
        different: Number of these groups that turned out to differ.
        examples: Size and first samples of the largest groups.
    """

    samples: int
    repeated: int
    groups: int
    chance_pairs: float
    compared: int
    different: int
    examples: list[tuple[int, list[str]]]


class Tally:
    """Counts values; keeps separate counts for the first MAX_DISTINCT distinct values."""

    def __init__(self) -> None:
        self.counts: dict[Any, int] = {}
        self.count = 0
        self.truncated = False

    def add(self, value: Any, times: int = 1) -> None:
        """Count a value `times` times."""
        self.count += times
        if value in self.counts:
            self.counts[value] += times
        elif len(self.counts) < MAX_DISTINCT:
            self.counts[value] = times
        else:
            self.truncated = True

    def frequencies(self, limit: int = TOP) -> Frequencies:
        """Return the `limit` most frequent values, ties in the order of values."""
        top = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:limit]
        return Frequencies(self.count, len(self.counts), self.truncated, top)


def distribution(values: NDArray[Any]) -> Distribution | None:
    """Return the distribution of numbers [N], which are reordered in place; None if N is 0."""
    if not len(values):
        return None
    median, p95, p99 = (_rank(share, len(values)) for share in QUANTILES)
    values.partition([median, p95, p99])
    return Distribution(
        count=len(values),
        total=values.sum().item(),
        min=values.min().item(),
        median=values[median].item(),
        p95=values[p95].item(),
        p99=values[p99].item(),
        max=values.max().item(),
    )


def distribution_of_counts(counts: Mapping[float, int]) -> Distribution | None:
    """Return the distribution of numbers whose occurrences are counted by value."""
    if not counts:
        return None
    values = sorted(counts)
    cumulative = np.cumsum([counts[value] for value in values])
    count = int(cumulative[-1])
    median, p95, p99 = (
        values[int(np.searchsorted(cumulative, _rank(share, count), side="right"))]
        for share in QUANTILES
    )
    total = sum(value * times for value, times in counts.items())
    return Distribution(count, total, values[0], median, p95, p99, values[-1])


def distribution_lines(
    rows: Sequence[tuple[str, Distribution | None, str]], total: bool = True
) -> Iterator[str]:
    """Format distributions as an aligned table.

    Args:
        rows: Label, distribution (skipped if None), and number format.
        total: Include a column of sums.

    Yields:
        Lines of the table, header first.
    """
    lines = [["", "count", "min", "median", "95 %", "99 %", "max", *(["total"] if total else [])]]
    for label, numbers, form in rows:
        if numbers is not None:
            values = [numbers.min, numbers.median, numbers.p95, numbers.p99, numbers.max]
            values += [numbers.total] if total else []
            lines.append([label, f"{numbers.count:,}", *(format(value, form) for value in values)])
    widths = [max(10, 2 + max(map(len, column))) for column in zip(*lines, strict=True)]
    for label, *cells in lines:
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield f"  {label:<18}{''.join(aligned)}"


def _rank(share: float, count: int) -> int:
    return max(0, math.ceil(share * count) - 1)


def row_chunks(index: Index) -> Iterator[I64]:
    """Yield all sample numbers in chunks."""
    for first in range(0, len(index), ROWS):
        yield np.arange(first, min(first + ROWS, len(index)))


def member_stats(index: Index, name: str) -> Member:
    """Return the statistics of the member with extension `name`."""
    samples = dict(index.member_counts)[name]
    sizes = np.empty(samples, np.int64)
    done, first_missing = 0, None
    for rows in row_chunks(index):
        present = index.take(f"{name}.offset", rows) > 0
        chunk_sizes = index.take(f"{name}.size", rows)[present]
        sizes[done : done + len(chunk_sizes)] = chunk_sizes
        done += len(chunk_sizes)
        if first_missing is None and not present.all():
            first_missing = index.where(int(rows[np.argmin(present)]))
    return Member(name, samples, len(index) - samples, first_missing, distribution(sizes))


def column_stats(index: Index, name: str) -> Column:
    """Return the statistics of an indexed json field; NaN counts as null."""
    column = index.table[name]
    if column.type == "double":
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    tally = Tally()
    for first in range(0, len(column), CHUNK):
        chunk = column.slice(first, CHUNK).drop_null().combine_chunks()
        values, counts = pc.value_counts(chunk).flatten()
        for value, times in zip(values.to_pylist(), counts.to_pylist(), strict=True):
            tally.add(value, times)
    minimum = maximum = None
    if column.type in ("int64", "double"):
        extremes = pc.min_max(column).as_py()
        minimum, maximum = extremes["min"], extremes["max"]
    return Column(name, column.null_count, tally.frequencies(), minimum, maximum)


def find_duplicates(index: Index, choices: Sequence[str]) -> Duplicates | None:
    """Find samples with equal members.

    Args:
        index: Set to search.
        choices: Extensions; a sample is compared by the first that it has.

    Returns:
        None if the index has no checksums or no such members.
    """
    members = [name for name in choices if name in index.members]
    if not index.settings.checksums or not members:
        return None
    keys = np.empty(len(index), np.uint64)
    count = 0
    for rows in row_chunks(index):
        present, row_keys = _member_keys(index, members, rows)
        keys[count : count + present.sum()] = row_keys[present]
        count += int(present.sum())
    keys = keys[:count]
    keys.sort()
    begin, length = equal_runs(keys)
    largest = np.argsort(-length, kind="stable")[:GROUPS]
    groups = _first_samples(index, members, keys[begin[largest]].copy())
    sizes = (keys >> np.uint64(32)).astype(np.uint32)
    _, same_size = equal_runs(sizes)
    pairs = float((same_size * (same_size - 1.0) / 2).sum())
    comparisons = [_equal_members(index, members, group) for group in groups]
    return Duplicates(
        samples=count,
        repeated=int(length.sum()),
        groups=len(length),
        chance_pairs=pairs / 2**32,
        compared=sum(equal is not None for equal in comparisons),
        different=sum(equal is False for equal in comparisons),
        examples=[
            (int(size), [index.where(sample) for sample in group])
            for size, group in zip(length[largest], groups, strict=True)
        ],
    )


def equal_runs(ordered: NDArray[Any]) -> tuple[I64, I64]:
    """Find runs of two or more equal values in a sorted array; return int64 starts, lengths."""
    same = np.zeros(len(ordered) + 1, np.int8)
    same[1:-1] = ordered[1:] == ordered[:-1]
    changes = np.flatnonzero(np.diff(same))
    return changes[::2], changes[1::2] - changes[::2] + 1


def _member_keys(index: Index, members: Sequence[str], rows: I64) -> tuple[NDArray[np.bool_], U64]:
    """Return which rows have one of `members`, and size << 32 | CRC-32C of the first they have."""
    present = np.zeros(len(rows), bool)
    keys = np.zeros(len(rows), np.uint64)
    for name in members:
        chosen = ~present & (index.take(f"{name}.offset", rows) > 0)
        sizes = index.take(f"{name}.size", rows).astype(np.uint64) << np.uint64(32)
        keys[chosen] = (sizes | index.take(f"{name}.crc", rows))[chosen]
        present |= chosen
    return present, keys


def _first_samples(index: Index, members: Sequence[str], wanted: U64) -> list[list[int]]:
    """Find up to COPIES samples for each key in `wanted`."""
    groups: dict[int, list[int]] = {int(key): [] for key in wanted}
    for rows in row_chunks(index) if groups else ():
        present, keys = _member_keys(index, members, rows)
        for position in np.flatnonzero(present & np.isin(keys, wanted)).tolist():
            group = groups[int(keys[position])]
            if len(group) < COPIES:
                group.append(int(rows[position]))
    return list(groups.values())


def _equal_members(index: Index, members: Sequence[str], group: Sequence[int]) -> bool | None:
    """Compare the members of a group byte by byte; None if one cannot be read."""
    with Reader(index) as reader:
        raws = reader.read_batch(np.array(group), members)
    first = [next(raw[name] for name in members if name in raw) for raw in raws]
    if not all(isinstance(data, bytes) for data in first):
        return None
    return len(set(first)) == 1
