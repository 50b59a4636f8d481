"""Order one source so that each batch contains one group, such as a domain or a language.

In every epoch, each group is shuffled and split into full batches. The samples left over go to a
pool. The pools of consecutive epochs form one sequence, which is split into mixed batches. By the
start of epoch e, floor(e * n / batch) batches of the n samples have occurred, so seeking is a
division. Which samples are left over and the order of the batches change with the epoch. A mixed
batch is not marked; the objective masks pairs of different groups.

The shuffle covers the full source, not a window of shards, so the source should be on a local disk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gigabatch.data.rng import I64, key, permute, permute_elementwise


class GroupedOrder:
    """A shuffled, endless order in which each batch contains one group, or is mixed.

    Immutable. Two orders are equal if their arguments are. An order takes 4 bytes per sample (8
    from 2^31 samples on), and 20 more during construction.

    Args:
        codes: Group of every sample, integers [n]. Every value is a group; a sample without a
            value has a unique code, and so comes in mixed batches.
        batch: Number of positions in a batch.
        seed: Seed that selects the order.
    """

    def __init__(self, codes: NDArray[np.integer], batch: int, seed: int) -> None:
        self.batch, self.seed, self.epoch_size = batch, seed, len(codes)
        by_group = np.argsort(codes, kind="stable")
        sorted_codes = codes[by_group]
        starts_group = np.ones(len(codes), bool)
        starts_group[1:] = sorted_codes[1:] != sorted_codes[:-1]
        # G groups, in ascending order of their codes.
        self._group_starts = np.append(np.flatnonzero(starts_group), len(codes))  # [G + 1]
        self._codes = sorted_codes[starts_group].astype(np.int64)  # [G]
        small = len(codes) < 1 << 31
        self._rows = by_group.astype(np.int32) if small else by_group  # [n]
        self._sizes = np.diff(self._group_starts)  # [G]
        self._full_offsets = _offsets(self._sizes // batch)  # [G + 1] in full batches
        self._pool_offsets = _offsets(self._sizes % batch)  # [G + 1] in samples

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, GroupedOrder)
            and (self.batch, self.seed) == (other.batch, other.seed)
            and np.array_equal(self._codes, other._codes)
            and np.array_equal(self._group_starts, other._group_starts)
            and np.array_equal(self._rows, other._rows)
        )

    def __hash__(self) -> int:
        return hash((self.batch, self.seed, self.epoch_size, len(self._codes)))

    def locate(self, positions: I64) -> tuple[I64, I64]:
        """Return (epoch, row) of positions, int64 [n] each."""
        batches, offsets = np.divmod(positions, self.batch)
        epochs, rows = np.empty_like(offsets), np.empty_like(offsets)
        for number in np.unique(batches):
            here = batches == number
            epochs[here], rows[here] = self._locate_in_batch(int(number), offsets[here])
        return epochs, rows

    def _locate_in_batch(self, number: int, offsets: I64) -> tuple[I64, I64]:
        """Return (epoch, row) at offsets in batch `number`."""
        # A batch belongs to the epoch in which its last sample would be if epochs of n samples
        # followed each other.
        epoch = ((number + 1) * self.batch - 1) // self.epoch_size
        first = epoch * self.epoch_size // self.batch
        count = (epoch + 1) * self.epoch_size // self.batch - first
        rng_key = key(self.seed, "batches", epoch)
        # The epoch's full batches come first, then its mixed batches, before this permutation.
        batch = int(permute(np.array([number - first]), count, rng_key)[0])
        full_batches = int(self._full_offsets[-1])
        if batch < full_batches:
            return self._locate_in_full_batch(epoch, batch, offsets)
        mixed = epoch * int(self._pool_offsets[-1]) // self.batch + batch - full_batches
        return self._locate_in_pools(mixed * self.batch + offsets)

    def _locate_in_full_batch(self, epoch: int, batch: int, offsets: I64) -> tuple[I64, I64]:
        """Return (epoch, row) at offsets in a full batch of an epoch."""
        group = int(np.searchsorted(self._full_offsets, batch, side="right")) - 1
        in_group = (batch - int(self._full_offsets[group])) * self.batch + offsets
        groups = np.full_like(offsets, group)
        return np.full_like(offsets, epoch), self._rows_of_groups(epoch, groups, in_group)

    def _locate_in_pools(self, positions: I64) -> tuple[I64, I64]:
        """Return (epoch, row) at positions in the sequence of all epochs' pools."""
        pool_size = int(self._pool_offsets[-1])
        epochs, offsets = np.divmod(positions, pool_size)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            # Each epoch starts at a different group; otherwise the same groups would always be
            # split between two mixed batches.
            begin = self._pool_offsets[key(self.seed, "pool", epoch) % len(self._codes)]
            offset = (offsets[here] + begin) % pool_size
            groups = np.searchsorted(self._pool_offsets, offset, side="right") - 1
            in_full = self._sizes[groups] // self.batch * self.batch
            in_group = in_full + offset - self._pool_offsets[groups]
            rows[here] = self._rows_of_groups(epoch, groups, in_group)
        return epochs, rows

    def _rows_of_groups(self, epoch: int, groups: I64, in_group: I64) -> I64:
        """Return the rows at positions in their groups, shuffled differently in every epoch."""
        distinct, inverse = np.unique(groups, return_inverse=True)
        codes = self._codes[distinct].tolist()
        rng_keys = np.array([key(self.seed, "group", epoch, c) for c in codes], np.uint64)[inverse]
        shuffled = permute_elementwise(in_group, self._sizes[groups], rng_keys)
        return self._rows[self._group_starts[groups] + shuffled].astype(np.int64)


def _offsets(counts: I64) -> I64:
    """Return offsets int64 [n + 1]: 0, then cumulative counts."""
    return np.concatenate([[0], np.cumsum(counts)])
