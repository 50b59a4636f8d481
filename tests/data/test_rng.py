"""The keyed generator is a versioned format: these literals may change only with its VERSION."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.data.rng import VERSION, key, permute, permute_elementwise, uniforms

STREAMS = st.integers(0, (1 << 64) - 1)


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
    ("size", "stream", "places"),
    [
        (1, 5, [0]),
        (2, 5, [0, 1]),
        (10, 7, [1, 2, 4, 9, 3, 0, 5, 7, 6, 8]),
        (13, (1 << 64) - 1, [6, 5, 8, 2, 0, 11, 1, 7, 10, 4, 3, 9, 12]),
    ],
)
def test_golden_permutations(size: int, stream: int, places: list[int]) -> None:
    assert permute(np.arange(size), size, stream).tolist() == places


def test_golden_permutation_of_a_size_that_no_table_could_hold() -> None:
    asked = np.array([0, 1, 10**9, 10**12 - 1])
    golden = [886243870538, 148513056094, 620864335160, 438169713437]
    assert permute(asked, 10**12, 99).tolist() == golden


def test_golden_permutation_of_more_than_is_worked_on_at_a_time() -> None:
    places = permute(np.arange(200_000), 200_000, 99)
    assert places[[0, 65_535, 65_536, 199_999]].tolist() == [12240, 146518, 164733, 28968]
    assert hashlib.sha256(places.astype("<i8")).hexdigest()[:16] == "9cf471c2897556c1"


@given(size=st.integers(1, 5000), stream=STREAMS)
def test_permute_is_a_bijection(size: int, stream: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, stream)), np.arange(size))


@given(size=st.integers(1, 5000), stream=STREAMS, data=st.data())
def test_permute_of_a_part_equals_the_part_of_the_whole(
    size: int, stream: int, data: st.DataObject
) -> None:
    part = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    assert np.array_equal(permute(part, size, stream), permute(np.arange(size), size, stream)[part])


def place(index: int, size: int, stream: int) -> int:
    """The permutation by the book, one index at a time, in whole numbers of any length."""
    half = 1
    while 4**half < size:
        half += 1
    words = (1 << 64) - 1
    while True:
        left, right = index >> half, index % 2**half
        for i in range(1, 7):
            x = right ^ ((stream + 0x9E3779B97F4A7C15 * i) & words)
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & words
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & words
            left, right = right, left ^ (x ^ (x >> 31)) % 2**half
        index = left << half | right
        if index < size:
            return index


INDICES = st.integers(1, 2**53).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n)))


@given(rows=st.lists(st.tuples(INDICES, STREAMS), max_size=20))
def test_many_permutations_at_once_equal_each_by_the_book(
    rows: list[tuple[tuple[int, int], int]],
) -> None:
    index, sizes = (np.array([row[0][i] for row in rows], np.int64) for i in (0, 1))
    streams = np.array([stream for _, stream in rows], np.uint64)
    book = [place(i, size, stream) for (i, size), stream in rows]
    assert permute_elementwise(index, sizes, streams).tolist() == book


@pytest.mark.parametrize("size", [1, 2, 4, 5, 16, 17, 255, 256, 257, 4096, 4097])
@pytest.mark.parametrize("stream", [0, (1 << 64) - 1])
def test_a_whole_permutation_equals_the_book(size: int, stream: int) -> None:
    book = [place(i, size, stream) for i in range(size)]
    assert permute(np.arange(size), size, stream).tolist() == book


@pytest.mark.parametrize("bits", [10, 11, 32, 33, 52, 53])
def test_the_network_is_as_wide_as_the_last_index_has_bits(bits: int) -> None:
    for size in (2**bits - 1, 2**bits, min(2**bits + 1, 2**53)):
        index = np.arange(size - 5, size)
        assert permute(index, size, 7).tolist() == [place(i, size, 7) for i in index.tolist()]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_of_few_things_is_about_equally_likely(size: int) -> None:
    draws = 4000
    counts = Counter(
        tuple(permute(np.arange(size), size, key("likely", s)).tolist()) for s in range(draws)
    )
    permutations = int(np.prod(np.arange(1, size + 1)))
    assert len(counts) == permutations
    expected = draws / permutations
    # Five standard deviations of a Poisson count.
    assert max(abs(c - expected) for c in counts.values()) < 5 * expected**0.5


@given(stream=STREAMS, rows=st.integers(0, 50), columns=st.integers(1, 12))
def test_uniforms_lie_in_the_half_open_unit_interval(stream: int, rows: int, columns: int) -> None:
    drawn = uniforms(stream, rows, columns)
    assert drawn.shape == (rows, columns)
    assert ((drawn >= 0) & (drawn < 1)).all()


def test_uniforms_are_even_and_unrelated() -> None:
    drawn = uniforms(key("even"), 100_000, 2)
    deviation = (1 / 12 / 100_000) ** 0.5
    assert np.abs(drawn.mean(0) - 0.5).max() < 5 * deviation
    histogram = np.histogram(drawn[:, 0], bins=20, range=(0, 1))[0]
    assert np.abs(histogram - 5000).max() < 5 * 5000**0.5
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 5 / 100_000**0.5
    other = uniforms(key("odd"), 100_000, 1)[:, 0]
    assert abs(np.corrcoef(drawn[:, 0], other)[0, 1]) < 5 / 100_000**0.5


def test_more_rows_begin_with_the_fewer() -> None:
    assert np.array_equal(uniforms(9, 7, 3)[:4], uniforms(9, 4, 3))
