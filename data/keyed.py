"""Keyed randomness: numbers that are a pure function of a key.

Nothing random in a run comes from a generator whose state moves: the shuffle, the augmentation
and the dropout seeds are functions of (seed, what, where). So a run can start anywhere, on any
number of workers, and see the same numbers. The functions are our own, fixed and versioned, since
a library may change its streams; `tests/data/test_keyed.py` pins their values.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

VERSION = 1
_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1

U64 = NDArray[np.uint64]


def _finalise(x: U64) -> U64:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: int | str) -> int:
    """One 64-bit key from integers and names; order matters, and 1 differs from "1"."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (VERSION, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(stream: int, rows: int, columns: int) -> NDArray[np.float32]:
    """[rows, columns] float32 in [0, 1): the counter-based stream named by `stream`."""
    counter = np.arange(1, rows * columns + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _finalise(counter + np.uint64(stream)) >> np.uint64(40)
    return (bits.astype(np.float32) * np.float32(2.0**-24)).reshape(rows, columns)


def permute(index: NDArray[np.int64], size: int, stream: int) -> NDArray[np.int64]:
    """Where each index in [0, size) goes under the permutation named by `stream`.

    A balanced Feistel network over the next even number of bits; a value that falls outside
    [0, size) walks its cycle until it is inside, at most four rounds on average. Cost is
    proportional to `index`, not to `size`: seeking needs no table and no sort.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    round_keys = [np.uint64((stream + _GOLDEN * (i + 1)) & _MASK64) for i in range(_ROUNDS)]

    def network(x: U64) -> U64:
        left, right = x >> shift, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (_finalise(right ^ round_key) & mask)
        return (left << shift) | right

    value = network(index.astype(np.uint64))
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = network(value[outside])
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)
