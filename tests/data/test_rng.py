"""The random numbers are a versioned format: these literals may change only with VERSION."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.data.rng import VERSION, key, permute, permute_elementwise, uniforms

RNG_KEYS = st.integers(0, (1 << 64) - 1)


@pytest.mark.parametrize(
    ("parts", "value"),
    [
        ((), 15854998268200131065),
        (("seed", 7), 7945592525466595605),
        ((1,), 9882527082058534065),
        (("1",), 5272752353482929026),
        ((1, 2), 17980058392292286369),
        ((2, 1), 7852378553450785867),
        (("shards", -3, "ü"), 6085534102360989569),
    ],
)
def test_golden_keys(parts: tuple[int | str, ...], value: int) -> None:
    assert VERSION == 1
    assert key(*parts) == value


def test_golden_uniforms() -> None:
    rows = [
        [0.1330796480178833, 0.20481657981872559, 0.11954253911972046],
        [0.17611777782440186, 0.5068801641464233, 0.33703452348709106],
    ]
    drawn = uniforms(12345, 2, 3)
    assert drawn.dtype == np.float32
    assert drawn.tolist() == rows
    assert uniforms((1 << 64) - 1, 1, 2).tolist() == [[0.8939428925514221, 0.9125971794128418]]


@pytest.mark.parametrize(
    ("size", "rng_key", "permuted"),
    [
        (1, 5, [0]),
        (2, 5, [0, 1]),
        (10, 7, [1, 2, 4, 9, 3, 0, 5, 7, 6, 8]),
        (13, (1 << 64) - 1, [6, 5, 8, 2, 0, 11, 1, 7, 10, 4, 3, 9, 12]),
    ],
)
def test_golden_permutations(size: int, rng_key: int, permuted: list[int]) -> None:
    assert permute(np.arange(size), size, rng_key).tolist() == permuted


def test_golden_permutation_of_huge_size() -> None:
    index = np.array([0, 1, 10**9, 10**12 - 1])
    golden = [886243870538, 148513056094, 620864335160, 438169713437]
    assert permute(index, 10**12, 99).tolist() == golden


def test_golden_permutation_of_several_chunks() -> None:
    permuted = permute(np.arange(200_000), 200_000, 99)
    assert permuted[[0, 65_535, 65_536, 199_999]].tolist() == [12240, 146518, 164733, 28968]
    assert hashlib.sha256(permuted.astype("<i8")).hexdigest()[:16] == "9cf471c2897556c1"


@given(size=st.integers(1, 5000), rng_key=RNG_KEYS)
def test_permute_is_a_bijection(size: int, rng_key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, rng_key)), np.arange(size))


@given(size=st.integers(1, 5000), rng_key=RNG_KEYS, data=st.data())
def test_permute_of_subset_matches_full_permutation(
    size: int, rng_key: int, data: st.DataObject
) -> None:
    part = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    assert np.array_equal(
        permute(part, size, rng_key), permute(np.arange(size), size, rng_key)[part]
    )


def permute_one(index: int, size: int, rng_key: int) -> int:
    """Compute the permutation of one index in plain Python."""
    half = 1
    while 4**half < size:
        half += 1
    words = (1 << 64) - 1
    while True:
        left, right = index >> half, index % 2**half
        for i in range(1, 7):
            x = right ^ ((rng_key + 0x9E3779B97F4A7C15 * i) & words)
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & words
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & words
            left, right = right, left ^ (x ^ (x >> 31)) % 2**half
        index = left << half | right
        if index < size:
            return index


INDICES = st.integers(1, 2**53).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n)))


@given(rows=st.lists(st.tuples(INDICES, RNG_KEYS), max_size=20))
def test_permute_elementwise_matches_plain_python(
    rows: list[tuple[tuple[int, int], int]],
) -> None:
    index, sizes = (np.array([row[0][i] for row in rows], np.int64) for i in (0, 1))
    rng_keys = np.array([rng_key for _, rng_key in rows], np.uint64)
    expected = [permute_one(i, size, rng_key) for (i, size), rng_key in rows]
    assert permute_elementwise(index, sizes, rng_keys).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 4, 5, 16, 17, 255, 256, 257, 4096, 4097])
@pytest.mark.parametrize("rng_key", [0, (1 << 64) - 1])
def test_full_permutation_matches_plain_python(size: int, rng_key: int) -> None:
    expected = [permute_one(i, size, rng_key) for i in range(size)]
    assert permute(np.arange(size), size, rng_key).tolist() == expected


@pytest.mark.parametrize("bits", [10, 11, 32, 33, 52, 53])
def test_permute_matches_plain_python_at_powers_of_two(bits: int) -> None:
    for size in (2**bits - 1, 2**bits, min(2**bits + 1, 2**53)):
        index = np.arange(size - 5, size)
        assert permute(index, size, 7).tolist() == [permute_one(i, size, 7) for i in index.tolist()]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_permutations_are_equally_likely(size: int) -> None:
    draws = 4000
    counts = Counter(
        tuple(permute(np.arange(size), size, key("likely", s)).tolist()) for s in range(draws)
    )
    permutations = int(np.prod(np.arange(1, size + 1)))
    assert len(counts) == permutations
    expected = draws / permutations
    # Five standard deviations of a Poisson count.
    assert max(abs(c - expected) for c in counts.values()) < 5 * expected**0.5


@given(rng_key=RNG_KEYS, rows=st.integers(0, 50), columns=st.integers(1, 12))
def test_uniforms_lie_in_half_open_unit_interval(rng_key: int, rows: int, columns: int) -> None:
    drawn = uniforms(rng_key, rows, columns)
    assert drawn.shape == (rows, columns)
    assert ((drawn >= 0) & (drawn < 1)).all()


def test_uniforms_are_even_and_uncorrelated() -> None:
    drawn = uniforms(key("even"), 100_000, 2)
    deviation = (1 / 12 / 100_000) ** 0.5
    assert np.abs(drawn.mean(0) - 0.5).max() < 5 * deviation
    histogram = np.histogram(drawn[:, 0], bins=20, range=(0, 1))[0]
    assert np.abs(histogram - 5000).max() < 5 * 5000**0.5
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 5 / 100_000**0.5
    other = uniforms(key("odd"), 100_000, 1)[:, 0]
    assert abs(np.corrcoef(drawn[:, 0], other)[0, 1]) < 5 / 100_000**0.5


def test_first_rows_of_uniforms_do_not_depend_on_row_count() -> None:
    assert np.array_equal(uniforms(9, 7, 3)[:4], uniforms(9, 4, 3))
