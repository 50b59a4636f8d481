from __future__ import annotations

import pickle
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.epoch_order import ShuffledOrder, micro_batch_range
from gigabatch.data.order.groups import GroupedOrder
from gigabatch.data.order.mixture import (
    BATCH_BLOCK,
    SAMPLE_BLOCK,
    Mixture,
    Phase,
    SampleOrder,
    apportion,
    batch_sample_numbers,
    from_sample_number,
    to_sample_number,
)
from gigabatch.data.rng import I64, key, permute

EVEN = (Phase(0, (1.0,)),)
SMALL = ShuffledOrder((3, 5, 2, 4), seed=11, window=2)


@dataclass(frozen=True)
class Line:
    """A source whose row is its position, so that rows show the positions requested."""

    epoch_size: int = 10**15

    def locate(self, positions: I64) -> tuple[I64, I64]:
        return positions // self.epoch_size, positions % self.epoch_size


def line_mixture(phases: tuple[Phase, ...], seed: int = 7, unit: int = 1) -> Mixture:
    return Mixture(tuple(Line() for _ in phases[0].weights), phases, seed, unit)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """Draw mixtures of one to four sources and up to three phases, of samples or small batches."""
    unit = draw(st.sampled_from([1, 2, 7]))
    count = draw(st.integers(1, 4))
    weights = st.lists(
        st.sampled_from([0.0, 0.05, 1 / 3, 1.0, 2.5]), min_size=count, max_size=count
    ).filter(any)
    width = unit * (SAMPLE_BLOCK if unit == 1 else BATCH_BLOCK)
    starts = draw(st.lists(st.integers(1, 4 * width), max_size=2, unique=True))
    phases = [Phase(start, tuple(draw(weights))) for start in [0, *sorted(starts)]]
    return line_mixture(tuple(phases), draw(st.integers(0, 2**63 - 1)), unit)


def width(mixture: Mixture) -> int:
    """Return the positions of a block."""
    return mixture.block * mixture.unit


def sequential_order(mixture: Mixture, blocks: int) -> tuple[I64, I64]:
    """Return source and position in it of the first blocks' positions, one after the other."""
    counters = [0] * len(mixture.orders)
    sources, source_positions = [], []
    for block in range(blocks):
        weights = [p.weights for p in mixture.phases if p.start <= block * width(mixture)][-1]
        slots = np.repeat(range(len(weights)), apportion(weights, mixture.block)).tolist()
        rng_key = key(mixture.seed, "mix", block)
        for slot in permute(np.arange(mixture.block), mixture.block, rng_key).tolist():
            for _ in range(mixture.unit):
                sources.append(slots[slot])
                source_positions.append(counters[slots[slot]])
                counters[slots[slot]] += 1
    return np.array(sources), np.array(source_positions)


@settings(max_examples=30)
@given(mixture=mixtures(), data=st.data())
def test_locate_matches_sequential_order(mixture: Mixture, data: st.DataObject) -> None:
    """For positions in any order, across changes of phase."""
    source, expected = sequential_order(mixture, blocks=5)
    indices = st.lists(st.integers(0, len(expected) - 1), max_size=50)
    positions = np.array(data.draw(indices), np.int64)
    located = mixture.locate(positions)
    assert all(part.dtype == np.int64 for part in located)
    assert np.array_equal(located.source, source[positions])
    assert np.array_equal(located.row, expected[positions])
    all_positions = mixture.locate(np.arange(len(expected)))
    assert np.array_equal(all_positions.source, source)
    assert np.array_equal(all_positions.row, expected)


@settings(max_examples=30)
@given(mixture=mixtures())
def test_every_source_advances_without_gaps(mixture: Mixture) -> None:
    located = mixture.locate(np.arange(5 * width(mixture)))
    for source in range(len(mixture.orders)):
        rows = located.row[located.source == source]
        assert np.array_equal(rows, np.arange(len(rows)))


@settings(max_examples=30)
@given(mixture=mixtures(), block=st.integers(0, 10**6))
def test_every_block_has_exact_share_of_every_source(mixture: Mixture, block: int) -> None:
    start = block * width(mixture)
    weights = [phase.weights for phase in mixture.phases if phase.start <= start][-1]
    source = mixture.locate(start + np.arange(width(mixture))).source
    counts = np.bincount(source, minlength=len(weights)) / mixture.unit
    shares = np.array(weights) / sum(weights) * mixture.block
    assert (np.abs(counts - shares) < 1).all()
    assert counts.tolist() == apportion(weights, mixture.block)


@settings(max_examples=50)
@given(mixture=mixtures(), data=st.data())
def test_samples_before_matches_counting(mixture: Mixture, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, 5 * width(mixture)))
    source = mixture.locate(np.arange(position)).source
    counted = np.bincount(source, minlength=len(mixture.orders))
    before = mixture.samples_before(position)
    assert before.dtype == np.int64
    assert before.tolist() == counted.tolist()


@pytest.mark.parametrize("unit", [1, 32_768])
def test_seek_to_position_1e9_is_correct_and_fast(unit: int) -> None:
    phases = (Phase(0, (0.7, 0.2, 0.1)), Phase(10**8, (1, 1, 2)), Phase(10**9 // 2, (0.3, 0, 0.7)))
    start_time = time.process_time()
    mixture = line_mixture(phases, unit=unit)
    positions = 10**9 + np.arange(50_000)
    located, before = mixture.locate(positions), mixture.samples_before(10**9)
    assert time.process_time() - start_time < 0.2
    assert before.sum() == 10**9
    for source in range(3):
        rows = located.row[located.source == source]
        assert np.array_equal(rows, before[source] + np.arange(len(rows)))
    # By hand: full blocks between the starts of phases, times shares.
    block = width(mixture)
    edges = [0, *(-(-start // block) for start in (10**8, 10**9 // 2)), 10**9 // block]
    shares = [(0.7, 0.2, 0.1), (0.25, 0.25, 0.5), (0.3, 0, 0.7)]
    expected = sum(
        n * block * np.array(share) for n, share in zip(np.diff(edges), shares, strict=True)
    )
    assert np.abs(before - expected).max() <= block


@pytest.mark.parametrize("unit", [1, 8])
def test_weights_switch_at_next_block_start(unit: int) -> None:
    block = unit * (SAMPLE_BLOCK if unit == 1 else BATCH_BLOCK)
    for start, edge in [(1, 1), (block - 1, 1), (block, 1), (block + 1, 2), (3 * block, 3)]:
        mixture = line_mixture((Phase(0, (1, 0)), Phase(start, (0, 1))), unit=unit)
        source = mixture.locate(np.arange(5 * block)).source
        assert source.tolist() == [0] * edge * block + [1] * (5 - edge) * block


def test_last_curriculum_phase_in_block_wins() -> None:
    mixture = line_mixture((Phase(0, (1, 0)), Phase(5, (0, 1)), Phase(6, (1, 3))))
    assert mixture.samples_before(SAMPLE_BLOCK).tolist() == [10_000, 0]
    assert mixture.samples_before(2 * SAMPLE_BLOCK).tolist() == [12_500, 7500]


@pytest.mark.parametrize("unit", [1, 5])
def test_single_source_keeps_its_order(unit: int) -> None:
    positions = 10**9 + np.arange(100)
    epochs, samples = SMALL.locate(positions)
    located = Mixture((SMALL,), EVEN, seed=3, unit=unit).locate(positions)
    assert not located.source.any()
    assert np.array_equal(located.epoch, epochs)
    assert np.array_equal(located.row, samples)
    assert Mixture((SMALL,), EVEN, seed=3, unit=unit).samples_before(12_345).tolist() == [12_345]


def test_source_of_weight_zero_changes_nothing() -> None:
    order = ShuffledOrder((900, 1100), seed=1, window=2)
    with_unused = Mixture((Line(), order), (Phase(0, (0, 1)),), seed=3)
    single = Mixture((order,), EVEN, seed=3)
    positions = np.arange(25_000)
    assert np.array_equal(with_unused.locate(positions).row, single.locate(positions).row)
    assert with_unused.samples_before(25_000).tolist() == [0, 25_000]


def test_unit_is_a_batch_of_one_source() -> None:
    mixture = line_mixture((Phase(0, (2, 1, 1)),), unit=16)
    located = mixture.locate(np.arange(16 * 300))
    source, rows = located.source.reshape(-1, 16), located.row.reshape(-1, 16)
    assert (source == source[:, :1]).all()
    assert (rows[:, 0] % 16 == 0).all()
    assert (np.diff(rows) == 1).all()
    assert np.bincount(source[:, 0]).tolist() == [150, 75, 75]


def test_sources_are_well_mixed_in_a_block() -> None:
    source = line_mixture((Phase(0, (0.8, 0.2)),)).locate(np.arange(SAMPLE_BLOCK)).source
    in_hundreds = source.reshape(-1, 100).sum(1)
    # 20 of a hundred are expected, with standard deviation 4; allow five deviations.
    assert np.abs(in_hundreds - 20).max() < 5 * 4
    assert in_hundreds.std() == pytest.approx(4, rel=0.3)


def test_seeds_and_blocks_mix_differently() -> None:
    phases = (Phase(0, (1, 1)),)
    one, two = (
        line_mixture(phases, seed).locate(np.arange(2 * SAMPLE_BLOCK)).source for seed in (1, 2)
    )
    assert not np.array_equal(one, two)
    assert not np.array_equal(one[:SAMPLE_BLOCK], one[SAMPLE_BLOCK:])


GOLDEN = Mixture(
    (SMALL, ShuffledOrder((30, 20), 5, 1), ShuffledOrder((9,), 2, 1)),
    (Phase(0, (5, 3, 2)), Phase(25_000, (1, 0, 1))),
    seed=42,
)


def test_golden_mixture() -> None:
    """The mixture is a versioned format: a resumed run must see the order it started with."""
    start = GOLDEN.locate(np.arange(16))
    assert start.source.tolist() == [0, 1, 2, 1, 0, 0, 2, 2, 0, 0, 1, 0, 1, 0, 0, 2]
    assert start.epoch.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert start.row.tolist() == [13, 11, 2, 12, 10, 6, 4, 8, 4, 12, 17, 3, 7, 7, 11, 5]
    far = GOLDEN.locate(10**9 + np.arange(6))
    assert far.source.tolist() == [0, 0, 2, 0, 0, 2]
    assert far.epoch.tolist() == [35714285, 35714285, 55554555, 35714285, 35714285, 55554555]
    assert far.row.tolist() == [7, 6, 6, 1, 0, 8]
    assert GOLDEN.samples_before(10**9 + 6).tolist() == [500000004, 9000, 499991002]


def test_golden_mixture_of_batches() -> None:
    located = replace(GOLDEN, unit=4).locate(4 * np.arange(12) + 1)
    assert located.source.tolist() == [0, 0, 0, 0, 2, 0, 0, 2, 0, 0, 0, 0]
    assert located.row.tolist() == [10, 3, 8, 1, 4, 0, 13, 6, 5, 1, 10, 5]


@given(mixture=mixtures())
def test_mixtures_with_equal_arguments_are_equal(mixture: Mixture) -> None:
    again = pickle.loads(pickle.dumps(mixture))
    assert again == mixture
    positions = np.arange(0, 3 * width(mixture), 997)
    assert np.array_equal(again.locate(positions).row, mixture.locate(positions).row)
    assert replace(mixture, seed=mixture.seed + 1) != mixture


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(any),
    seats=st.integers(1, 20_000),
)
def test_apportion_follows_largest_remainder(weights: list[float], seats: int) -> None:
    counts = np.array(apportion(tuple(weights), seats))
    quotas = np.array(weights) / sum(weights) * seats
    assert counts.sum() == seats
    # Otherwise a seat would have gone to a source with a larger remainder.
    assert np.ptp(counts - quotas) < 1 + 1e-6


@pytest.mark.parametrize(
    ("weights", "seats", "counts"),
    [
        ((1, 1, 1), 100, [34, 33, 33]),  # ties by order
        ((0.1, 0.2, 0.7), 10_000, [1000, 2000, 7000]),
        ((1, 2, 3), 7, [1, 2, 4]),
        ((0, 5, 0), 9, [0, 9, 0]),
        ((1e-5, 1), 10_000, [0, 10_000]),
    ],
)
def test_apportion_matches_hand_computed_counts(
    weights: tuple[float, ...], seats: int, counts: list[int]
) -> None:
    assert apportion(weights, seats) == counts


@pytest.mark.parametrize(
    ("sources", "phases", "unit", "message"),
    [
        (2, (Phase(0, (1, 1e-5)),), 1, r"train\[1\]: weight 1e-05 of .* none of the 10000 samples"),
        (2, (Phase(0, (1, 1e-3)),), 64, r"none of the 100 batches of a block.* at least 0.01001"),
        (2, (Phase(0, (1, 1)), Phase(9, (1e-9, 1))), 1, r"train\[0\].*from sample 9 on"),
        (2, (Phase(0, (1, 1, 1)),), 1, "3 weights for 2 sources from sample 0"),
        (2, (Phase(0, (1, -1)),), 1, "below 0"),
        (2, (Phase(0, (3, -1)),), 1, "below 0"),
        (2, (Phase(0, (0, 0)),), 1, "one must be above 0"),
        (2, (Phase(0, (1, float("nan"))),), 1, "weights"),
        (2, (Phase(0, (1, float("inf"))),), 1, "infinite"),
        (1, (Phase(1, (1,)),), 1, r"start at 0 and increase; got \[1\]"),
        (1, (Phase(0, (1,)), Phase(5, (1,)), Phase(5, (1,))), 1, r"got \[0, 5, 5\]"),
        (1, (), 1, r"got \[\]"),
    ],
)
def test_invalid_weights_raise(
    sources: int, phases: tuple[Phase, ...], unit: int, message: str
) -> None:
    with pytest.raises(GigabatchError, match=message):
        Mixture((Line(),) * sources, phases, seed=1, unit=unit)


@pytest.mark.parametrize(
    "empty", [ShuffledOrder((0, 0), 1, 1), GroupedOrder(np.array([], np.int64), 4, 1)]
)
def test_empty_source_raises(empty: SampleOrder) -> None:
    with pytest.raises(GigabatchError, match=r"data.train\[1\]: contains no samples"):
        Mixture((SMALL, empty), (Phase(0, (1, 1)),), seed=1)


@given(
    locations=st.lists(
        st.tuples(st.integers(0, 2**22), st.integers(0, 2**40 - 1)), max_size=20, unique=True
    )
)
def test_sample_numbers_are_unique_and_invertible(
    locations: list[tuple[int, int]],
) -> None:
    source, sample = (np.array([location[i] for location in locations], np.int64) for i in (0, 1))
    numbers = to_sample_number(source, sample)
    assert numbers.dtype == np.int64
    assert [
        tuple(pair)
        for pair in zip(*map(np.ndarray.tolist, from_sample_number(numbers)), strict=True)
    ] == locations
    assert [locations[i] for i in np.argsort(numbers)] == sorted(locations)


@given(step=st.integers(1, 10**6), size=st.integers(1, 64))
def test_batch_sample_numbers_are_sorted_positions(step: int, size: int) -> None:
    batch = batch_sample_numbers(GOLDEN, step, size)
    assert (np.diff(batch) >= 0).all()
    located = GOLDEN.locate(np.arange((step - 1) * size, step * size))
    assert np.array_equal(batch, np.sort(to_sample_number(located.source, located.row)))


def test_batch_may_straddle_two_epochs() -> None:
    batch = batch_sample_numbers(Mixture((SMALL,), EVEN, seed=3), 2, 10)
    assert batch.tolist() == [0, 0, 1, 1, 2, 2, 6, 8, 9, 9]
    assert batch.tolist() == sorted(SMALL.locate(np.arange(10, 20))[1].tolist())


def test_grouped_sources_give_batches_of_one_source_and_group() -> None:
    codes = np.random.default_rng(0).integers(0, 3, 500)
    orders = (
        GroupedOrder(codes, 16, 1),
        ShuffledOrder((200, 100), 2, 2),
        GroupedOrder(codes[:90], 16, 3),
    )
    mixture = Mixture(orders, (Phase(0, (3, 2, 1)),), seed=5, unit=16)
    single_group = 0
    for step in range(1, 301):
        source, sample = from_sample_number(batch_sample_numbers(mixture, step, 16))
        assert (source == source[0]).all()
        single_group += source[0] != 1 and len(np.unique(codes[sample])) == 1
    of_groups = 300 - int(mixture.samples_before(16 * 300)[1]) // 16
    assert 0.85 * of_groups < single_group < of_groups


GLOBAL, MICRO = 48, 4
SIZES = (700, 130, 41)


def run(mixture: Mixture, worlds: list[int]) -> dict[tuple[int, int], list[int]]:
    """Return (step, micro-batch) -> samples, collected from the ranks.

    `worlds` is the world size at every step; where it changes, the run is resumed.
    """
    batches: dict[tuple[int, int], list[int]] = {}
    for step, world in enumerate(worlds, start=1):
        if worlds[step - 2 : step - 1] != [world]:
            mixture = pickle.loads(pickle.dumps(mixture))
        for rank in range(world):
            batch = batch_sample_numbers(mixture, step, GLOBAL)
            for j in micro_batch_range(GLOBAL // MICRO, world, rank):
                assert (step, j) not in batches
                batches[step, j] = batch[j * MICRO : (j + 1) * MICRO].tolist()
    return batches


@settings(max_examples=15)
@given(
    stretches=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 5, 8]), st.integers(1, 8)), min_size=2, max_size=5
    ),
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
    later=st.integers(1, 2000),
    unit=st.sampled_from([1, GLOBAL]),
    seed=st.integers(0, 2**63 - 1),
)
def test_batches_are_equal_for_any_world_sizes(
    stretches: list[tuple[int, int]], weights: list[float], later: int, unit: int, seed: int
) -> None:
    orders = tuple(ShuffledOrder((n // 2, 0, n - n // 2), seed, 2) for n in SIZES)
    mixture = Mixture(orders, (Phase(0, tuple(weights)), Phase(later, (1, 2, 1))), seed, unit)
    worlds = [world for world, steps in stretches for _ in range(steps)]
    batches = run(mixture, worlds)
    assert batches == run(mixture, [1] * len(worlds))
    for step in range(1, len(worlds) + 1):
        batch = [number for j in range(GLOBAL // MICRO) for number in batches[step, j]]
        assert batch == batch_sample_numbers(mixture, step, GLOBAL).tolist()
    source, sample = from_sample_number(np.array([n for batch in batches.values() for n in batch]))
    for s, (size, count) in enumerate(zip(SIZES, mixture.samples_before(len(source)), strict=True)):
        epochs, more = divmod(int(count), size)
        times = np.bincount(sample[source == s], minlength=size)
        assert sorted(times.tolist()) == [epochs] * (size - more) + [epochs + 1] * more
