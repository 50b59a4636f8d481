"""The order of samples, and how a global batch is cut and dealt: formulas, no state.

position -> (epoch, sample). The shards are permuted anew each epoch; a window slides over
`window` consecutive shards of that permutation, and the samples inside a window are permuted.
Every sample comes once an epoch. A batch is a set of positions; sorted by sample number (so by
shard), it is cut into numbered micro-batches, and whole runs of them are dealt to ranks. None of
this depends on the world size except which rank holds which micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gigabatch.data.keyed import key, permute

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """A shuffled, endless walk over a set of shards.

    `shard_sizes`: samples in each shard, in sample-number order. `window`: how many shards are
    mixed at a time (1 shuffles only inside a shard; more than the number of shards is a full
    shuffle).
    """

    shard_sizes: tuple[int, ...]
    seed: int
    window: int

    @property
    def epoch_size(self) -> int:
        return sum(self.shard_sizes)

    def locate(self, positions: I64) -> tuple[I64, I64]:
        """(epoch, sample number) of each position; both int64 of the shape of `positions`."""
        epochs = positions // self.epoch_size
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._in_epoch(int(epoch), positions[here] % self.epoch_size)
        return epochs, samples

    def _in_epoch(self, epoch: int, offset: I64) -> I64:
        walk = _epoch_walk(self, epoch)
        window = np.searchsorted(walk.window_starts, offset, side="right") - 1
        shuffled = np.empty_like(offset)
        for w in np.unique(window):
            here = window == w
            start, end = walk.window_starts[w], walk.window_starts[w + 1]
            stream = key(self.seed, "window", epoch, int(w))
            shuffled[here] = start + permute(offset[here] - start, int(end - start), stream)
        slot = np.searchsorted(walk.slot_starts, shuffled, side="right") - 1
        return walk.first_sample[slot] + shuffled - walk.slot_starts[slot]


@dataclass(frozen=True)
class _Walk:
    """One epoch's shards, in the order they are visited."""

    slot_starts: I64  # [S + 1] offset in the epoch at which each visited shard starts
    first_sample: I64  # [S] sample number of the visited shard's first row
    window_starts: I64  # [ceil(S / window) + 1] offsets at which windows start


@lru_cache(maxsize=4)
def _epoch_walk(order: Order, epoch: int) -> _Walk:
    sizes = np.asarray(order.shard_sizes, dtype=np.int64)
    visit = permute(np.arange(len(sizes)), len(sizes), key(order.seed, "shards", epoch))
    slot_starts = np.concatenate([[0], np.cumsum(sizes[visit])])
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])[visit]
    edges = np.append(slot_starts[:-1][:: order.window], slot_starts[-1])
    return _Walk(slot_starts, first, edges)


def batch_samples(order: Order, step: int, global_size: int) -> I64:
    """[global_size] sample numbers of step `step` (the first is 1), sorted, so grouped by shard.

    A batch that straddles an epoch's edge may hold a sample twice; both rows carry the same
    number, which is how the objective knows.
    """
    positions = np.arange((step - 1) * global_size, step * global_size, dtype=np.int64)
    return np.sort(order.locate(positions)[1])


def deal(micro_batches: int, world_size: int, rank: int) -> range:
    """The run of micro-batch numbers that `rank` holds; runs differ in length by at most one."""
    first = rank * micro_batches // world_size
    return range(first, (rank + 1) * micro_batches // world_size)


def rounds(micro_batches: int, world_size: int) -> int:
    """Micro-batches every rank must run, dummies included, so that collectives pair up."""
    return -(-micro_batches // world_size)
