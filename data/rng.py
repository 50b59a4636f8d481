"""Keyed randomness: numbers that are a pure function of a key.

Nothing random in a run comes from a generator whose state moves: the shuffle, the augmentation
and the dropout seeds are functions of (seed, what, where). So a run can start anywhere, on any
number of workers, and see the same numbers. The functions are our own, fixed and versioned, since
a library may change its streams; `tests/data/test_rng.py` pins their values.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

VERSION = 1
_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1
_ROUND_STEPS = [_GOLDEN * (i + 1) & _MASK64 for i in range(_ROUNDS)]
_CHUNK = 1 << 16  # what permute works on at a time stays in a core's cache

I64 = NDArray[np.int64]
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


def permute(index: I64, size: int, stream: int) -> I64:
    """Where each index in [0, size) goes under the permutation named by `stream`.

    `index`: int64 [n]. A balanced Feistel network over the next even number of bits; a value that
    falls outside [0, size) walks its cycle until it is inside, at most four rounds on average.
    Cost is proportional to `index`, not to `size`: seeking needs no table and no sort.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    if index.size < 2 << half:
        each = np.broadcast_to(np.int64(size), index.shape)
        return permute_each(index, each, np.broadcast_to(np.uint64(stream), index.shape))
    # A round sees half the bits: where it is asked for each of them often, a table is quicker.
    mask = (1 << half) - 1
    halves = np.arange(1 << half, dtype=np.uint64)
    round_keys = [np.uint64((stream + step) & _MASK64) for step in _ROUND_STEPS]
    tables = [(_finalise(halves ^ k) & np.uint64(mask)).astype(np.int64) for k in round_keys]

    def network(x: I64) -> I64:
        left, right = x >> half, x & mask
        for table in tables:
            left, right = right, left ^ table.take(right)
        return (left << half) | right

    placed = np.empty(index.shape, np.int64)
    for first in range(0, index.size, _CHUNK):
        value = network(index[first : first + _CHUNK])
        outside = np.flatnonzero(value >= size)
        while outside.size:
            value[outside] = network(value[outside])
            outside = outside[value[outside] >= size]
        placed[first : first + _CHUNK] = value
    return placed


def permute_each(index: I64, sizes: I64, streams: U64) -> I64:
    """`permute(index[i], sizes[i], streams[i])` for all i at once: many permutations, few of each.

    `index`, `sizes`: int64 [n], `sizes` at most 2^53. `streams`: uint64 [n].
    """
    bits = np.frexp(np.maximum(sizes - 1, 1).astype(np.float64))[1]  # bit lengths
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    value = index.astype(np.uint64)
    limits = sizes.astype(np.uint64)
    value = _network(value, half, streams)
    outside = np.flatnonzero(value >= limits)
    while outside.size:
        value[outside] = _network(value[outside], half[outside], streams[outside])
        outside = outside[value[outside] >= limits[outside]]
    return value.astype(np.int64)


def _network(x: U64, half: U64, streams: U64) -> U64:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for step in _ROUND_STEPS:
        left, right = right, left ^ (_finalise(right ^ (streams + np.uint64(step))) & mask)
    return (left << half) | right
