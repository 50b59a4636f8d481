"""The order in which rows are packed, and the search for repeated keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gigabatch.data.packing.tables import BATCH_ROWS
from gigabatch.data.rng import key, permute


def packing_order(start: int, count: int, seed: int | None) -> Iterator[int]:
    """Yield the rows at positions `start` to `count` - 1; `seed` permutes them, None does not."""
    for first in range(start, count, BATCH_ROWS):
        positions = np.arange(first, min(first + BATCH_ROWS, count), dtype=np.int64)
        if seed is not None:
            positions = permute(positions, count, key(seed, "pack"))
        yield from positions.tolist()


def find_repeated_key(keys: Callable[[], Iterator[str]]) -> str | None:
    """Describe the first key that occurs twice; None if all differ.

    Args:
        keys: Function that returns an iterator over all keys. It is called again if hashes repeat,
            so that only eight bytes per key are in memory.
    """
    hashes, counts = np.unique(np.fromiter(map(hash, keys()), np.int64), return_counts=True)
    repeated_hashes = set(hashes[counts > 1].tolist())
    first_row: dict[str, int] = {}
    for row, name in enumerate(keys() if repeated_hashes else ()):
        if hash(name) in repeated_hashes and first_row.setdefault(name, row) != row:
            return f"rows {first_row[name]} and {row} have the same key {name!r}"
    return None
