"""Compute the shuffled order of one source, and the split of a global batch over ranks.

Both are formulas without state. The order maps position -> (epoch, row):

1. The shards are permuted, differently in every epoch.
2. The permuted shards are grouped into windows of `window` consecutive shards.
3. The samples inside a window are permuted.

Every sample therefore occurs once per epoch. A global batch is a range of positions of one or
several sources (`mixture.py`). It is sorted by sample number, and thus by shard, and split into
numbered micro-batches; each rank gets a contiguous range of them. The world size only decides which
rank gets which micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gigabatch.data.rng import I64, key, permute, permute_elementwise

EPOCHS_CACHED = 2
"""Number of epochs whose shard order is cached; a batch may span two."""


class ShuffledOrder:
    """A shuffled, endless order of a set of shards.

    Immutable. Two orders are equal if their arguments are; pickling stores only the arguments.

    Args:
        shard_sizes: int64 [S], number of samples in every shard; a shard may be empty.
        seed: Seed that selects the order.
        window: Number of consecutive shards whose samples are mixed. 1 shuffles only inside a
            shard; S or more is a full shuffle.
    """

    def __init__(self, shard_sizes: Sequence[int] | I64, seed: int, window: int) -> None:
        self.shard_sizes = np.array(shard_sizes, np.int64)
        self.shard_sizes.setflags(write=False)
        self.seed, self.window = seed, window
        self.epoch_size = int(self.shard_sizes.sum())
        self._shard_orders: dict[int, _ShardOrder] = {}

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ShuffledOrder)
            and (self.seed, self.window) == (other.seed, other.window)
            and np.array_equal(self.shard_sizes, other.shard_sizes)
        )

    def __hash__(self) -> int:
        return hash((self.seed, self.window, len(self.shard_sizes), self.epoch_size))

    def __reduce__(self) -> tuple[type[ShuffledOrder], tuple[I64, int, int]]:
        return ShuffledOrder, (self.shard_sizes, self.seed, self.window)

    @cached_property
    def shard_starts(self) -> I64:
        """Row at which every shard starts, then the number of rows; int64 [S + 1]."""
        return _offsets(self.shard_sizes)

    def locate(self, positions: I64) -> tuple[I64, I64]:
        """Return (epoch, row) of positions, int64 [n] each."""
        epochs, offsets = np.divmod(positions, self.epoch_size)
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._rows_in_epoch(int(epoch), offsets[here])
        return epochs, rows

    def _rows_in_epoch(self, epoch: int, offset: I64) -> I64:
        """Return the rows at offsets in an epoch, int64 [n]."""
        order = self._shard_order(epoch)
        window = np.searchsorted(order.window_starts, offset, side="right") - 1
        start, end = order.window_starts[window], order.window_starts[window + 1]
        windows, inverse = np.unique(window, return_inverse=True)
        keys = [key(self.seed, "window", epoch, w) for w in windows.tolist()]
        rng_keys = np.array(keys, np.uint64)[inverse]
        shuffled = start + permute_elementwise(offset - start, end - start, rng_keys)
        slot = np.searchsorted(order.slot_starts, shuffled, side="right") - 1
        return self.shard_starts[order.shards[slot]] + shuffled - order.slot_starts[slot]

    def _shard_order(self, epoch: int) -> _ShardOrder:
        """Return the order of the shards in an epoch, from the cache if possible."""
        if epoch not in self._shard_orders:
            while len(self._shard_orders) >= EPOCHS_CACHED:
                del self._shard_orders[next(iter(self._shard_orders))]
            self._shard_orders[epoch] = _permute_shards(self, epoch)
        return self._shard_orders[epoch]


@dataclass(frozen=True)
class _ShardOrder:
    """The order of one epoch's shards."""

    shards: I64  # [S] the shard in each slot
    slot_starts: I64  # [S + 1] offset in the epoch at which each slot starts
    window_starts: I64  # [ceil(S / window) + 1] offset at which each window starts


def _permute_shards(order: ShuffledOrder, epoch: int) -> _ShardOrder:
    sizes = order.shard_sizes
    shards = permute(np.arange(len(sizes)), len(sizes), key(order.seed, "shards", epoch))
    slot_starts = _offsets(sizes.take(shards))
    window_starts = np.append(slot_starts[:-1][:: order.window], slot_starts[-1])
    return _ShardOrder(shards, slot_starts, window_starts)


def _offsets(sizes: I64) -> I64:
    """Return offsets int64 [n + 1]: 0, then cumulative sizes."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def micro_batch_range(micro_batches: int, world_size: int, rank: int) -> range:
    """Return the micro-batch numbers of `rank`; the ranks' counts differ by at most one."""
    first = rank * micro_batches // world_size
    return range(first, (rank + 1) * micro_batches // world_size)


def micro_batches_per_rank(micro_batches: int, world_size: int) -> int:
    """Return the number of micro-batches per rank, including padding, so that collectives match."""
    return -(-micro_batches // world_size)
