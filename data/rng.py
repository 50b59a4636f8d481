"""Counter-based random numbers: pure functions of (key, index).

A run uses no generator with mutable state. The shuffle, the augmentation and the dropout
seeds are functions of (seed, purpose, location), so a run can start at any step, on any number of
workers, and see the same numbers. Libraries may change their generators between versions; these
functions are fixed and versioned, and `tests/data/test_rng.py` pins their values.
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
_CHUNK = 1 << 16  # indices that `permute` processes at a time; they fit in a core's cache

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]


def _finalize(x: U64) -> U64:
    """Apply SplitMix64's finalizer (Steele, Lea, Flood 2014) elementwise."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: int | str) -> int:
    """Hash integers and names to one 64-bit key; order matters, and 1 differs from "1"."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (VERSION, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(rng_key: int, rows: int, columns: int) -> NDArray[np.float32]:
    """Return uniform numbers in [0, 1), float32 [rows, columns].

    The first rows do not depend on `rows`.
    """
    counter = np.arange(1, rows * columns + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _finalize(counter + np.uint64(rng_key)) >> np.uint64(40)
    return (bits.astype(np.float32) * np.float32(2.0**-24)).reshape(rows, columns)


def permute(index: I64, size: int, rng_key: int) -> I64:
    """Apply a random permutation of [0, size) to some indices.

    The permutation is a balanced Feistel network over the next even number of bits. A result
    outside [0, size) goes through the network again until it is inside, at most four times on
    average. The cost is proportional to `len(index)`, not to `size`, so seeking needs no table or
    sort.

    Args:
        index: int64 [n], values in [0, size).
        size: Number of elements permuted.
        rng_key: 64-bit key that selects the permutation.

    Returns:
        int64 [n], the image of each index.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    if index.size < 2 << half:
        sizes = np.broadcast_to(np.int64(size), index.shape)
        rng_keys = np.broadcast_to(np.uint64(rng_key), index.shape)
        return permute_elementwise(index, sizes, rng_keys)
    # A round maps half the bits. With this many indices, a table of that map is faster.
    mask = (1 << half) - 1
    halves = np.arange(1 << half, dtype=np.uint64)
    round_keys = [np.uint64((rng_key + step) & _MASK64) for step in _ROUND_STEPS]
    tables = [(_finalize(halves ^ k) & np.uint64(mask)).astype(np.int64) for k in round_keys]

    def network(x: I64) -> I64:
        left, right = x >> half, x & mask
        for table in tables:
            left, right = right, left ^ table.take(right)
        return (left << half) | right

    permuted = np.empty(index.shape, np.int64)
    for first in range(0, index.size, _CHUNK):
        value = network(index[first : first + _CHUNK])
        outside = np.flatnonzero(value >= size)
        while outside.size:
            value[outside] = network(value[outside])
            outside = outside[value[outside] >= size]
        permuted[first : first + _CHUNK] = value
    return permuted


def permute_elementwise(index: I64, sizes: I64, rng_keys: U64) -> I64:
    """Return `permute(index[i], sizes[i], rng_keys[i])` for all i at once.

    Args:
        index: int64 [n], `index[i]` in [0, sizes[i]).
        sizes: int64 [n], at most 2^53.
        rng_keys: uint64 [n].

    Returns:
        int64 [n], the image of each index under its own permutation.
    """
    bit_lengths = np.frexp(np.maximum(sizes - 1, 1).astype(np.float64))[1]
    half = np.maximum(1, (bit_lengths + 1) // 2).astype(np.uint64)
    value = index.astype(np.uint64)
    limits = sizes.astype(np.uint64)
    value = _network(value, half, rng_keys)
    outside = np.flatnonzero(value >= limits)
    while outside.size:
        value[outside] = _network(value[outside], half[outside], rng_keys[outside])
        outside = outside[value[outside] >= limits[outside]]
    return value.astype(np.int64)


def _network(x: U64, half: U64, rng_keys: U64) -> U64:
    """Apply the Feistel network elementwise; `half` is the number of bits in half of `x`."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for step in _ROUND_STEPS:
        left, right = right, left ^ (_finalize(right ^ (rng_keys + np.uint64(step))) & mask)
    return (left << half) | right
