"""Several sources mixed by weight, in a formula: position -> (source, epoch, sample).

Positions are cut into units (a sample, or a whole batch of one source), and units into blocks.
In each block every source has exactly its share of the units; a keyed permutation says which.
Each source is walked in its own order, one position after the other, so where a position lies
in it follows from whole blocks (a product) and the block it is in (a count). Weights hold for
whole blocks: then seeking costs the same wherever, and no state is kept. Of a single source the
positions are just its own.
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

NUMBER_BITS = 40
"""A sample's number is `source << NUMBER_BITS | sample`: one int64 for all sources."""
SAMPLE_BLOCK = 10_000
"""Samples of a block, where units are samples: weights are exact to 0.01 %."""
BATCH_BLOCK = 100
"""Units of a block, where units are batches: enough for weights of 1 %, few enough that a source
of 1 % is never away for 200 steps, and that new weights begin within 100."""


class Walk(Protocol):
    """A source's own endless order, such as an `Order`."""

    @property
    def epoch_size(self) -> int: ...

    def locate(self, positions: I64) -> tuple[I64, I64]:
        """(epoch, sample) of each position; all int64 [n]."""
        ...


class Phase(NamedTuple):
    """From position `start` on (rounded up to a block's edge) sources have these weights."""

    start: int
    weights: tuple[float, ...]


class Located(NamedTuple):
    """Where positions lie; all int64 [n]. `epoch`: of the source."""

    source: I64
    epoch: I64
    sample: I64


@dataclass(frozen=True)
class Mixture:
    """An endless walk over S sources.

    `walks`: one for each source. `phases`: the first starts at 0; starts grow. `unit`: consecutive
    positions that come of one source (1, or the global batch size for batches of one source).
    Raises GigabatchError where a phase gives a source less than one unit in a block, or a source
    is empty.
    """

    walks: tuple[Walk, ...]
    phases: tuple[Phase, ...]
    seed: int
    unit: int = 1

    def __post_init__(self) -> None:
        starts = [phase.start for phase in self.phases]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise GigabatchError(f"data.curriculum: phases must start at 0 and grow; got {starts}.")
        for source, walk in enumerate(self.walks):
            if not walk.epoch_size:
                raise GigabatchError(f"data.train[{source}]: it has no sample. Leave it out.")
        _ = self._counts  # raises where weights do not fit

    @property
    def block(self) -> int:
        """Units of a block."""
        return SAMPLE_BLOCK if self.unit == 1 else BATCH_BLOCK

    @cached_property
    def _first_block(self) -> I64:
        """[phases] the block at which each begins."""
        width = self.unit * self.block
        return np.array([-(-phase.start // width) for phase in self.phases], np.int64)

    @cached_property
    def _counts(self) -> I64:
        """[phases, S] units of each source in a block."""
        counts = [self._shares(phase) for phase in self.phases]
        return np.array(counts, np.int64).reshape(len(self.phases), len(self.walks))

    def _shares(self, phase: Phase) -> list[int]:
        if len(phase.weights) != len(self.walks):
            raise GigabatchError(
                f"data.curriculum: {len(phase.weights)} weights for {len(self.walks)} sources from "
                f"sample {phase.start} on. Give one each."
            )
        total = sum(phase.weights)
        if not 0 < total < inf or min(phase.weights) < 0:
            raise GigabatchError(
                f"data.curriculum: weights {phase.weights} from sample {phase.start} on. None may "
                "below 0 or infinite, and one must be above 0."
            )
        counts = apportion(phase.weights, self.block)
        for source, (weight, count) in enumerate(zip(phase.weights, counts, strict=True)):
            if weight and not count:
                units = "samples" if self.unit == 1 else "batches"
                raise GigabatchError(
                    f"data.train[{source}]: weight {weight:g} of {total:g} (from sample "
                    f"{phase.start} on) gives it none of the {self.block} {units} of a block, over "
                    f"which weights are exact. Make it at least {total / self.block:g}, or 0."
                )
        return counts

    @cached_property
    def _before_phase(self) -> I64:
        """[phases, S] units of each source before each phase."""
        blocks = np.diff(self._first_block)
        before = np.zeros_like(self._counts)
        np.cumsum(blocks[:, None] * self._counts[:-1], axis=0, out=before[1:])
        return before

    def locate(self, positions: I64) -> Located:
        """The source, its epoch and its sample at each position, int64 [n]."""
        if len(self.walks) == 1:
            return Located(np.zeros_like(positions), *self.walks[0].locate(positions))
        units, within = np.divmod(positions, self.unit)
        source, of_source = self._place(units)
        own = of_source * self.unit + within
        epoch, sample = np.empty_like(own), np.empty_like(own)
        for s in np.unique(source):
            here = source == s
            epoch[here], sample[here] = self.walks[s].locate(own[here])
        return Located(source, epoch, sample)

    def drawn(self, position: int) -> I64:
        """[S] samples of each source at all positions before `position`."""
        if len(self.walks) == 1:
            return np.array([position], np.int64)
        unit, within = divmod(position, self.unit)
        block, inside = divmod(unit, self.block)
        phase = self._phase(block)
        source = self._sources(block, phase)
        units = self._before(block, phase)
        units += np.bincount(source[:inside], minlength=len(self.walks))
        samples = units * self.unit
        samples[source[inside]] += within
        return samples

    def _place(self, units: I64) -> tuple[I64, I64]:
        """(source, the unit's number among those of its source) of each unit."""
        blocks, inside = np.divmod(units, self.block)
        source, of_source = np.empty_like(units), np.empty_like(units)
        for block in np.unique(blocks):
            here = blocks == block
            phase = self._phase(int(block))
            all_sources = self._sources(int(block), phase)
            number = self._before(int(block), phase)[all_sources] + _rank(all_sources)
            source[here] = all_sources[inside[here]]
            of_source[here] = number[inside[here]]
        return source, of_source

    def _phase(self, block: int) -> int:
        return int(np.searchsorted(self._first_block, block, side="right")) - 1

    def _before(self, block: int, phase: int) -> I64:
        """[S] units of each source before a block."""
        blocks = block - self._first_block[phase]
        before: I64 = self._before_phase[phase] + blocks * self._counts[phase]
        return before

    def _sources(self, block: int, phase: int) -> I64:
        """[block] the source of each unit of a block."""
        slot = permute(np.arange(self.block), self.block, key(self.seed, "mix", block))
        return np.repeat(np.arange(len(self.walks)), self._counts[phase])[slot]


def apportion(weights: tuple[float, ...], seats: int) -> list[int]:
    """How many of `seats` each weight gets, by largest remainder; of equals, the first.

    In fractions, since a rounded sum could turn out otherwise on another machine.
    """
    total = sum(map(Fraction, weights))
    quotas = [Fraction(weight) * seats / total for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: seats - sum(counts)]:
        counts[i] += 1
    return counts


def _rank(source: I64) -> I64:
    """[n] how many of the same source come before each."""
    order = np.argsort(source, kind="stable")
    counts = np.bincount(source)
    rank = np.empty_like(source)
    rank[order] = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def number_of(source: I64, sample: I64) -> I64:
    """[n] sample numbers, unique over all sources."""
    return (source << NUMBER_BITS) | sample


def split_number(number: I64) -> tuple[I64, I64]:
    """(source, sample) of sample numbers."""
    return number >> NUMBER_BITS, number & ((1 << NUMBER_BITS) - 1)


def batch_numbers(mixture: Mixture, step: int, global_size: int) -> I64:
    """[global_size] sample numbers of step `step` (the first is 1), sorted: by source, then shard.

    A batch that straddles an epoch's edge may hold a sample twice; both rows carry the same
    number, which is how the objective knows.
    """
    positions = np.arange((step - 1) * global_size, step * global_size, dtype=np.int64)
    located = mixture.locate(positions)
    return np.sort(number_of(located.source, located.sample))
