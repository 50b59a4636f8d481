"""What an index alone tells of a set: counts, sizes, equal members, values of fields.

No shard is read but to compare a few members that look equal. Columns are read in pieces; what
is kept of each sample is at most eight bytes at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from gigabatch.data.shards.index import I64, ROWS, Index
from gigabatch.data.shards.reader import Reader

TOP = 10
"""Most frequent values that are told."""
DISTINCT = 100_000
"""Distinct values that are told apart."""
SLICE = 1 << 17
"""Rows of which values are counted at a time."""
SHARES = (0.5, 0.95, 0.99)
GROUPS, COPIES = 5, 3
"""Groups of equal members that are shown, and members of each that are compared."""
U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Spread:
    """Of `count` numbers, their sum, extremes and quantiles: the least number that as large a
    share does not exceed."""

    count: int
    total: float
    min: float
    median: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class Frequencies:
    """How often values occur. `more`: there are more than the `distinct` that were told apart;
    `top` then holds the most frequent of those, with their true counts."""

    count: int
    distinct: int
    more: bool
    top: list[tuple[Any, int]]


@dataclass(frozen=True)
class Member:
    """`samples` have it, `lacking` do not; `first_lacking` names one."""

    name: str
    samples: int
    lacking: int
    first_lacking: str | None
    bytes: Spread | None


@dataclass(frozen=True)
class Column:
    """A field of the json member that the index holds. `min`, `max`: of numbers alone."""

    name: str
    nulls: int
    values: Frequencies
    min: float | None
    max: float | None


@dataclass(frozen=True)
class Duplicates:
    """Samples whose member equals another's, by CRC-32C and size.

    `samples` have one, `repeated` of them lie in `groups` of equals. `by_chance`: pairs expected
    to look equal though they differ. Of the largest groups, `examples` (size, first samples),
    `compared` were read, of which `different` were not equal byte by byte.
    """

    samples: int
    repeated: int
    groups: int
    by_chance: float
    compared: int
    different: int
    examples: list[tuple[int, list[str]]]


class Tally:
    """Counts values, of which the first DISTINCT different ones are told apart."""

    def __init__(self) -> None:
        self.counts: dict[Any, int] = {}
        self.count = 0
        self.more = False

    def add(self, value: Any, times: int = 1) -> None:
        self.count += times
        if value in self.counts:
            self.counts[value] += times
        elif len(self.counts) < DISTINCT:
            self.counts[value] = times
        else:
            self.more = True

    def frequencies(self, most: int = TOP) -> Frequencies:
        """Of the `most` frequent values; equal counts in the order of their values."""
        top = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:most]
        return Frequencies(self.count, len(self.counts), self.more, top)


def spread(values: NDArray[Any]) -> Spread | None:
    """Of numbers [N], which it reorders; None where there are none."""
    if not len(values):
        return None
    half, most, nearly = (_rank(share, len(values)) for share in SHARES)
    values.partition([half, most, nearly])
    return Spread(
        count=len(values),
        total=values.sum().item(),
        min=values.min().item(),
        median=values[half].item(),
        p95=values[most].item(),
        p99=values[nearly].item(),
        max=values.max().item(),
    )


def spread_of_counts(counts: Mapping[float, int]) -> Spread | None:
    """Of numbers counted by value."""
    if not counts:
        return None
    values = sorted(counts)
    until = np.cumsum([counts[value] for value in values])
    count = int(until[-1])
    half, most, nearly = (
        values[int(np.searchsorted(until, _rank(share, count), side="right"))] for share in SHARES
    )
    total = sum(value * times for value, times in counts.items())
    return Spread(count, total, values[0], half, most, nearly, values[-1])


def spread_lines(
    rows: Sequence[tuple[str, Spread | None, str]], total: bool = True
) -> Iterator[str]:
    """A table of (label, spread, number format), the columns aligned."""
    lines = [["", "count", "min", "median", "95 %", "99 %", "max", *(["total"] if total else [])]]
    for label, found, form in rows:
        if found is not None:
            values = [found.min, found.median, found.p95, found.p99, found.max]
            values += [found.total] if total else []
            lines.append([label, f"{found.count:,}", *(format(value, form) for value in values)])
    widths = [max(10, 2 + max(map(len, column))) for column in zip(*lines, strict=True)]
    for label, *cells in lines:
        numbers = (f"{cell:>{wide}}" for cell, wide in zip(cells, widths[1:], strict=True))
        yield f"  {label:<18}{''.join(numbers)}"


def _rank(share: float, count: int) -> int:
    return max(0, math.ceil(share * count) - 1)


def pieces(index: Index) -> Iterator[I64]:
    """All sample numbers, some at a time."""
    for first in range(0, len(index), ROWS):
        yield np.arange(first, min(first + ROWS, len(index)))


def member_of(index: Index, name: str) -> Member:
    held = dict(index.member_counts)[name]
    sizes = np.empty(held, np.int64)
    done, lacking = 0, None
    for rows in pieces(index):
        here = index.take(f"{name}.offset", rows) > 0
        found = index.take(f"{name}.size", rows)[here]
        sizes[done : done + len(found)] = found
        done += len(found)
        if lacking is None and not here.all():
            lacking = index.where(int(rows[np.argmin(here)]))
    return Member(name, held, len(index) - held, lacking, spread(sizes))


def column_of(index: Index, name: str) -> Column:
    column = index.table[name]
    tally = Tally()
    for first in range(0, len(column), SLICE):
        part = column.slice(first, SLICE).drop_null().combine_chunks()
        values, counts = pc.value_counts(part).flatten()
        for value, times in zip(values.to_pylist(), counts.to_pylist(), strict=True):
            tally.add(value, times)
    least = most = None
    if column.type in ("int64", "double"):
        ends = pc.min_max(column).as_py()
        least, most = ends["min"], ends["max"]
    return Column(name, column.null_count, tally.frequencies(), least, most)


def duplicates(index: Index, choices: Sequence[str]) -> Duplicates | None:
    """Of the first of `choices` (extensions) that each sample has; None without checksums."""
    members = [name for name in choices if name in index.members]
    if not index.settings.checksums or not members:
        return None
    keys = np.empty(len(index), np.uint64)
    count = 0
    for rows in pieces(index):
        held, found = _keys(index, members, rows)
        keys[count : count + held.sum()] = found[held]
        count += int(held.sum())
    keys = keys[:count]
    keys.sort()
    begin, length = runs(keys)
    largest = np.argsort(-length, kind="stable")[:GROUPS]
    groups = _groups(index, members, keys[begin[largest]].copy())
    sizes = (keys >> np.uint64(32)).astype(np.uint32)
    _, same_size = runs(sizes)
    pairs = float((same_size * (same_size - 1.0) / 2).sum())
    equal = [_compare(index, members, group) for group in groups]
    return Duplicates(
        samples=count,
        repeated=int(length.sum()),
        groups=len(length),
        by_chance=pairs / 2**32,
        compared=sum(same is not None for same in equal),
        different=sum(same is False for same in equal),
        examples=[
            (int(size), [index.where(sample) for sample in group])
            for size, group in zip(length[largest], groups, strict=True)
        ],
    )


def runs(ordered: NDArray[Any]) -> tuple[I64, I64]:
    """(begin, length) of each run of two or more equals in a sorted array."""
    same = np.zeros(len(ordered) + 1, np.int8)
    same[1:-1] = ordered[1:] == ordered[:-1]
    turns = np.flatnonzero(np.diff(same))
    return turns[::2], turns[1::2] - turns[::2] + 1


def _keys(index: Index, members: Sequence[str], rows: I64) -> tuple[NDArray[np.bool_], U64]:
    """Which rows have one of `members`, and size << 32 | CRC-32C of the first that each has."""
    held = np.zeros(len(rows), bool)
    keys = np.zeros(len(rows), np.uint64)
    for name in members:
        here = ~held & (index.take(f"{name}.offset", rows) > 0)
        sizes = index.take(f"{name}.size", rows).astype(np.uint64) << np.uint64(32)
        keys[here] = (sizes | index.take(f"{name}.crc", rows))[here]
        held |= here
    return held, keys


def _groups(index: Index, members: Sequence[str], wanted: U64) -> list[list[int]]:
    """The first COPIES samples with each of the keys `wanted`."""
    found: dict[int, list[int]] = {int(key): [] for key in wanted}
    for rows in pieces(index) if found else ():
        held, keys = _keys(index, members, rows)
        for at in np.flatnonzero(held & np.isin(keys, wanted)).tolist():
            group = found[int(keys[at])]
            if len(group) < COPIES:
                group.append(int(rows[at]))
    return list(found.values())


def _compare(index: Index, members: Sequence[str], group: Sequence[int]) -> bool | None:
    """Whether members of a group are equal; None where one cannot be read."""
    with Reader(index) as reader:
        raws = reader.read_batch(np.array(group), members)
    first = [next(raw[name] for name in members if name in raw) for raw in raws]
    if not all(isinstance(data, bytes) for data in first):
        return None
    return len(set(first)) == 1
