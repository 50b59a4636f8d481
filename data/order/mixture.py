"""Mix weighted sources by a formula: position -> (source, epoch, row).

Positions are grouped into units (one sample, or a full batch of one source), and units into blocks.
In each block every source has exactly its share of the units, placed by a random permutation.
Each source is read in its own order. A position's place in that order follows from the full blocks
before it (a product) and the block that it is in (a count), so seeking costs the same everywhere
and no state is kept. To allow this, weights apply to full blocks. A single source is read in its
own order, without blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import inf
from typing import NamedTuple, Protocol

import numpy as np

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import I64, key, permute

SAMPLE_BITS = 40
"""A sample number is `source << SAMPLE_BITS | row`: one int64, unique over all sources."""
SAMPLE_BLOCK = 10_000
"""Number of units in a block if a unit is a sample; weights are then exact to 0.01 %."""
BATCH_BLOCK = 100
"""Number of units in a block if a unit is a batch. It is large enough for weights of 1 %, and small
enough that a source of 1 % is never absent for 200 steps and new weights apply within 100 steps."""


class SampleOrder(Protocol):
    """The endless order of one source, such as a `ShuffledOrder`."""

    @property
    def epoch_size(self) -> int: ...

    def locate(self, positions: I64) -> tuple[I64, I64]:
        """Return (epoch, row) of positions, int64 [n] each."""
        ...


class Phase(NamedTuple):
    """Weights of the sources from position `start` on, rounded up to the start of a block."""

    start: int
    weights: tuple[float, ...]


class Locations(NamedTuple):
    """The samples at n positions: source number, epoch of the source, row; int64 [n] each."""

    source: I64
    epoch: I64
    row: I64


@dataclass(frozen=True)
class Mixture:
    """An endless order over S sources.

    Args:
        orders: The order of every source.
        phases: Weights of the sources; the first phase starts at 0, and starts increase.
        seed: Seed that selects the order.
        unit: Number of consecutive positions that come from one source: 1, or the global batch
            size for batches of one source.

    Raises:
        GigabatchError: if a phase gives a source less than one unit in a block, or a source is
            empty.
    """

    orders: tuple[SampleOrder, ...]
    phases: tuple[Phase, ...]
    seed: int
    unit: int = 1

    def __post_init__(self) -> None:
        starts = [phase.start for phase in self.phases]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise GigabatchError(
                f"data.curriculum: phases must start at 0 and increase; got {starts}. Sort "
                "from_sample and remove repeats."
            )
        for source, order in enumerate(self.orders):
            if not order.epoch_size:
                raise GigabatchError(f"data.train[{source}]: contains no samples. Remove it.")
        _ = self._counts  # raises if weights are invalid

    @property
    def block(self) -> int:
        """Number of units in a block."""
        return SAMPLE_BLOCK if self.unit == 1 else BATCH_BLOCK

    @cached_property
    def _first_block(self) -> I64:
        """Block at which every phase starts, int64 [phases]."""
        block_positions = self.unit * self.block
        return np.array([-(-phase.start // block_positions) for phase in self.phases], np.int64)

    @cached_property
    def _counts(self) -> I64:
        """Number of units of every source in a block, int64 [phases, S]."""
        counts = [self._units_of_phase(phase) for phase in self.phases]
        return np.array(counts, np.int64).reshape(len(self.phases), len(self.orders))

    def _units_of_phase(self, phase: Phase) -> list[int]:
        """Check a phase's weights; return the number of units of every source in a block."""
        where = f"from sample {phase.start} on"
        if len(phase.weights) != len(self.orders):
            raise GigabatchError(
                f"data.curriculum: {len(phase.weights)} weights for {len(self.orders)} sources "
                f"{where}. Set one weight per source."
            )
        total = sum(phase.weights)
        if not 0 < total < inf or min(phase.weights) < 0:
            raise GigabatchError(
                f"data.curriculum: weights {phase.weights} {where}. No weight may be below 0 or "
                "infinite, and one must be above 0."
            )
        counts = apportion(phase.weights, self.block)
        for source, (weight, count) in enumerate(zip(phase.weights, counts, strict=True)):
            if weight and not count:
                units = "samples" if self.unit == 1 else "batches"
                raise GigabatchError(
                    f"data.train[{source}]: weight {weight:g} of {total:g} ({where}) gives it none "
                    f"of the {self.block} {units} of a block, over which weights are exact. Set it "
                    f"to at least {total / self.block:g}, or to 0."
                )
        return counts

    @cached_property
    def _units_before_phase(self) -> I64:
        """Number of units of every source before every phase, int64 [phases, S]."""
        blocks = np.diff(self._first_block)
        before = np.zeros_like(self._counts)
        np.cumsum(blocks[:, None] * self._counts[:-1], axis=0, out=before[1:])
        return before

    def locate(self, positions: I64) -> Locations:
        """Return source, epoch and row of positions, int64 [n]."""
        if len(self.orders) == 1:
            return Locations(np.zeros_like(positions), *self.orders[0].locate(positions))
        units, in_unit = np.divmod(positions, self.unit)
        source, unit_of_source = self._locate_units(units)
        source_positions = unit_of_source * self.unit + in_unit
        epoch, row = np.empty_like(source_positions), np.empty_like(source_positions)
        for s in np.unique(source):
            here = source == s
            epoch[here], row[here] = self.orders[s].locate(source_positions[here])
        return Locations(source, epoch, row)

    def samples_before(self, position: int) -> I64:
        """Count the samples of every source at positions before `position`, int64 [S]."""
        if len(self.orders) == 1:
            return np.array([position], np.int64)
        unit, in_unit = divmod(position, self.unit)
        block, in_block = divmod(unit, self.block)
        phase = self._phase(block)
        source = self._sources_in_block(block, phase)
        units = self._units_before_block(block, phase)
        units += np.bincount(source[:in_block], minlength=len(self.orders))
        samples = units * self.unit
        samples[source[in_block]] += in_unit
        return samples

    def _locate_units(self, units: I64) -> tuple[I64, I64]:
        """Return the source of units, and each unit's number within its source; int64 [n]."""
        blocks, in_block = np.divmod(units, self.block)
        source, unit_of_source = np.empty_like(units), np.empty_like(units)
        for block in np.unique(blocks):
            here = blocks == block
            phase = self._phase(int(block))
            block_sources = self._sources_in_block(int(block), phase)
            before = self._units_before_block(int(block), phase)
            numbers = before[block_sources] + _count_earlier(block_sources)
            source[here] = block_sources[in_block[here]]
            unit_of_source[here] = numbers[in_block[here]]
        return source, unit_of_source

    def _phase(self, block: int) -> int:
        """Return the number of the phase that a block is in."""
        return int(np.searchsorted(self._first_block, block, side="right")) - 1

    def _units_before_block(self, block: int, phase: int) -> I64:
        """Return the number of units of every source before a block, int64 [S]."""
        blocks = block - self._first_block[phase]
        before: I64 = self._units_before_phase[phase] + blocks * self._counts[phase]
        return before

    def _sources_in_block(self, block: int, phase: int) -> I64:
        """Return the source of every unit of a block, int64 [block]."""
        slot = permute(np.arange(self.block), self.block, key(self.seed, "mix", block))
        return np.repeat(np.arange(len(self.orders)), self._counts[phase])[slot]


def apportion(weights: tuple[float, ...], seats: int) -> list[int]:
    """Distribute seats in proportion to weights, by largest remainder; the first wins a tie."""
    # Use fractions: a rounded sum could differ between machines.
    total = sum(map(Fraction, weights))
    quotas = [Fraction(weight) * seats / total for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: seats - sum(counts)]:
        counts[i] += 1
    return counts


def _count_earlier(source: I64) -> I64:
    """Count earlier entries of the same source; return int64 [n]."""
    order = np.argsort(source, kind="stable")
    counts = np.bincount(source)
    earlier = np.empty_like(source)
    earlier[order] = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    return earlier


def to_sample_number(source: I64, row: I64) -> I64:
    """Combine source numbers and rows into sample numbers, int64 [n]."""
    return (source << SAMPLE_BITS) | row


def from_sample_number(number: I64) -> tuple[I64, I64]:
    """Split sample numbers into (source, row), int64 [n] each."""
    return number >> SAMPLE_BITS, number & ((1 << SAMPLE_BITS) - 1)


def batch_sample_numbers(mixture: Mixture, step: int, global_size: int) -> I64:
    """Return the sample numbers of a global batch, sorted: by source, then by shard.

    A batch that spans two epochs may contain a sample twice. Both rows then have the same number,
    by which the objective recognizes them.

    Args:
        mixture: The order.
        step: The training step, from 1.
        global_size: Number of samples in a global batch.

    Returns:
        int64 [global_size].
    """
    positions = np.arange((step - 1) * global_size, step * global_size, dtype=np.int64)
    locations = mixture.locate(positions)
    return np.sort(to_sample_number(locations.source, locations.row))
