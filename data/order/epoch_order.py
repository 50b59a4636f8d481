"""The order of a source's samples, and how a global batch is dealt: formulas, no state.

position -> (epoch, sample). The shards are permuted anew each epoch; a window slides over
`window` consecutive shards of that permutation, and the samples inside a window are permuted.
Every sample comes once an epoch. A batch is a set of positions of one or several sources
(mixture.py); sorted by sample number (so by shard), it is cut into numbered micro-batches, and
whole runs of them are dealt to ranks. None of this depends on the world size except which rank
holds which micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gigabatch.data.rng import I64, key, permute, permute_each

WALKS_KEPT = 2
"""Epochs whose walks an order keeps at hand: a batch may straddle the edge of two."""


class Order:
    """A shuffled, endless walk over a set of shards.

    `shard_sizes`: samples in each shard, in sample-number order; a shard may be empty. `window`:
    how many shards are mixed at a time (1 shuffles only inside a shard; more than the number of
    shards is a full shuffle). A value: compared by its arguments, and pickled as them.
    """

    def __init__(self, shard_sizes: Sequence[int] | I64, seed: int, window: int) -> None:
        self.shard_sizes = np.array(shard_sizes, np.int64)
        self.shard_sizes.setflags(write=False)
        self.seed, self.window = seed, window
        self.epoch_size = int(self.shard_sizes.sum())
        self._walks: dict[int, _Walk] = {}

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Order)
            and (self.seed, self.window) == (other.seed, other.window)
            and np.array_equal(self.shard_sizes, other.shard_sizes)
        )

    def __hash__(self) -> int:
        return hash((self.seed, self.window, len(self.shard_sizes), self.epoch_size))

    def __reduce__(self) -> tuple[type[Order], tuple[I64, int, int]]:
        return Order, (self.shard_sizes, self.seed, self.window)

    @cached_property
    def first_sample(self) -> I64:
        """[S + 1] the sample number at which each shard starts."""
        return _starts(self.shard_sizes)

    def locate(self, positions: I64) -> tuple[I64, I64]:
        """(epoch, sample number) of each position; all int64 [n]."""
        epochs, offsets = np.divmod(positions, self.epoch_size)
        samples = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._in_epoch(int(epoch), offsets[here])
        return epochs, samples

    def _in_epoch(self, epoch: int, offset: I64) -> I64:
        walk = self._walk(epoch)
        window = np.searchsorted(walk.window_starts, offset, side="right") - 1
        start, end = walk.window_starts[window], walk.window_starts[window + 1]
        used, which = np.unique(window, return_inverse=True)
        streams = [key(self.seed, "window", epoch, w) for w in used.tolist()]
        each = np.array(streams, np.uint64)[which]
        shuffled = start + permute_each(offset - start, end - start, each)
        slot = np.searchsorted(walk.slot_starts, shuffled, side="right") - 1
        return self.first_sample[walk.visit[slot]] + shuffled - walk.slot_starts[slot]

    def _walk(self, epoch: int) -> _Walk:
        if epoch not in self._walks:
            while len(self._walks) >= WALKS_KEPT:
                del self._walks[next(iter(self._walks))]
            self._walks[epoch] = _walk_of(self, epoch)
        return self._walks[epoch]


@dataclass(frozen=True)
class _Walk:
    """One epoch's shards, in the order they are visited."""

    visit: I64  # [S] the shard in each slot
    slot_starts: I64  # [S + 1] offset in the epoch at which each slot starts
    window_starts: I64  # [ceil(S / window) + 1] offsets at which windows start


def _walk_of(order: Order, epoch: int) -> _Walk:
    sizes = order.shard_sizes
    visit = permute(np.arange(len(sizes)), len(sizes), key(order.seed, "shards", epoch))
    slot_starts = _starts(sizes.take(visit))
    edges = np.append(slot_starts[:-1][:: order.window], slot_starts[-1])
    return _Walk(visit, slot_starts, edges)


def _starts(sizes: I64) -> I64:
    """[n + 1] where each of n things of these sizes starts, and where the last ends."""
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


def deal(micro_batches: int, world_size: int, rank: int) -> range:
    """The run of micro-batch numbers that `rank` holds; runs differ in length by at most one."""
    first = rank * micro_batches // world_size
    return range(first, (rank + 1) * micro_batches // world_size)


def rounds(micro_batches: int, world_size: int) -> int:
    """Micro-batches every rank must run, dummies included, so that collectives pair up."""
    return -(-micro_batches // world_size)
