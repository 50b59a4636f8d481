"""Batches of one group (a domain, a language): a source's order, made of whole batches.

Of n samples an epoch cuts each group, shuffled, into full batches; what is left over goes into a
pool, which epoch after epoch is one stream, cut into mixed batches. By the start of epoch e,
floor(e * n / batch) batches have come, so seeking is a division. Which samples are left over, and
how the batches follow each other, changes by epoch. A mixed batch is known by its samples' groups
alone: the objective masks pairs of different ones.

The order is shuffled over the whole source, not over windows of shards: let it be on a local disk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gigabatch.data.rng import I64, key, permute, permute_each


class Grouped:
    """A shuffled, endless walk in which every `batch` positions share a group, or are mixed.

    `codes`: integers [n], the group of each sample, in sample-number order (any value is a group,
    also that of "unknown"). `batch`: positions of a batch. A value: compared by what it was made
    of. Memory: 4 bytes a sample (8 above 2^31 samples); while it is made, some 20 more.
    """

    def __init__(self, codes: NDArray[np.integer], batch: int, seed: int) -> None:
        self.batch, self.seed, self.epoch_size = batch, seed, len(codes)
        ordered = np.argsort(codes, kind="stable")
        of_group = codes[ordered]
        opens = np.ones(len(codes), bool)
        opens[1:] = of_group[1:] != of_group[:-1]
        self._first = np.append(np.flatnonzero(opens), len(codes))
        self._codes = of_group[opens].astype(np.int64)
        small = len(codes) < 1 << 31
        self._members = ordered.astype(np.int32) if small else ordered
        self._sizes = np.diff(self._first)
        self._full = _ends(self._sizes // batch)
        self._left = _ends(self._sizes % batch)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Grouped)
            and (self.batch, self.seed) == (other.batch, other.seed)
            and np.array_equal(self._codes, other._codes)
            and np.array_equal(self._first, other._first)
            and np.array_equal(self._members, other._members)
        )

    def __hash__(self) -> int:
        return hash((self.batch, self.seed, self.epoch_size, len(self._codes)))

    def locate(self, positions: I64) -> tuple[I64, I64]:
        """(epoch, sample number) of each position; all int64 [n]."""
        batches, rows = np.divmod(positions, self.batch)
        epochs, samples = np.empty_like(rows), np.empty_like(rows)
        for number in np.unique(batches):
            here = batches == number
            epochs[here], samples[here] = self._in_batch(int(number), rows[here])
        return epochs, samples

    def _in_batch(self, number: int, rows: I64) -> tuple[I64, I64]:
        # Batch k is of the epoch in which its last sample lies where an epoch is n in a row.
        epoch = ((number + 1) * self.batch - 1) // self.epoch_size
        start = epoch * self.epoch_size // self.batch
        count = (epoch + 1) * self.epoch_size // self.batch - start
        stream = key(self.seed, "batches", epoch)
        place = int(permute(np.array([number - start]), count, stream)[0])
        full = int(self._full[-1])
        if place < full:
            return self._in_full(epoch, place, rows)
        mixed = epoch * int(self._left[-1]) // self.batch + place - full
        return self._in_pool(mixed * self.batch + rows)

    def _in_full(self, epoch: int, place: int, rows: I64) -> tuple[I64, I64]:
        group = int(np.searchsorted(self._full, place, side="right")) - 1
        within = (place - int(self._full[group])) * self.batch + rows
        groups = np.full_like(rows, group)
        return np.full_like(rows, epoch), self._sample(epoch, groups, within)

    def _in_pool(self, places: I64) -> tuple[I64, I64]:
        """(epoch, sample) at places of the stream of what is left over."""
        pool = int(self._left[-1])
        epochs, offsets = np.divmod(places, pool)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            # Begun at another group each epoch, so that it is not always the same that are cut.
            begin = self._left[key(self.seed, "pool", epoch) % len(self._codes)]
            offset = (offsets[here] + begin) % pool
            groups = np.searchsorted(self._left, offset, side="right") - 1
            within = self._sizes[groups] // self.batch * self.batch + offset - self._left[groups]
            samples[here] = self._sample(epoch, groups, within)
        return epochs, samples

    def _sample(self, epoch: int, groups: I64, within: I64) -> I64:
        """The sample at a place of its group, each epoch in another order."""
        used, which = np.unique(groups, return_inverse=True)
        codes = self._codes[used].tolist()
        streams = np.array([key(self.seed, "group", epoch, c) for c in codes], np.uint64)[which]
        shuffled = permute_each(within, self._sizes[groups], streams)
        return self._members[self._first[groups] + shuffled].astype(np.int64)


def _ends(counts: I64) -> I64:
    """[n + 1] 0, and how many things there are up to and with each of n."""
    return np.concatenate([[0], np.cumsum(counts)])
