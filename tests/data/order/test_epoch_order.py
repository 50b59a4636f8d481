from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.data.order.epoch_order import (
    ShuffledOrder,
    micro_batch_range,
    micro_batches_per_rank,
)
from gigabatch.data.rng import key, permute

ORDERS = st.builds(
    ShuffledOrder,
    # An empty shard is allowed; it takes a slot in the order of shards.
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any).map(tuple),
    st.integers(0, 2**63 - 1),
    st.integers(1, 15),
)
SMALL = ShuffledOrder((3, 5, 2, 4), seed=11, window=2)


def epoch_of(order: ShuffledOrder, epoch: int) -> np.ndarray:
    first = epoch * order.epoch_size
    epochs, samples = order.locate(np.arange(first, first + order.epoch_size))
    assert (epochs == epoch).all()
    return samples


@given(order=ORDERS, epoch=st.integers(0, 10**6))
def test_epoch_holds_every_sample_once(order: ShuffledOrder, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_of(order, epoch)), np.arange(order.epoch_size))


def test_golden_positions() -> None:
    """The order is a versioned format: a resumed run must see the order it started with."""
    epochs, samples = SMALL.locate(np.arange(28))
    assert epochs.tolist() == [0] * 14 + [1] * 14
    assert samples[:14].tolist() == [13, 10, 6, 4, 12, 3, 7, 11, 5, 8, 2, 9, 0, 1]
    assert samples[14:].tolist() == [1, 9, 2, 0, 8, 6, 4, 13, 12, 10, 3, 5, 7, 11]


def test_seek_to_position_1e9_is_correct_and_fast() -> None:
    order = ShuffledOrder((1000,) * 10_000, seed=3, window=8)
    start = time.perf_counter()
    epochs, samples = order.locate(np.array([10**9, 10**9 + 1, 10**9 + 7 * 10**6]))
    assert time.perf_counter() - start < 0.5
    assert epochs.tolist() == [100, 100, 100]
    assert samples.tolist() == [
        sequential_sample(order, 100, offset) for offset in (0, 1, 7 * 10**6)
    ]


def sequential_sample(order: ShuffledOrder, epoch: int, offset: int) -> int:
    """Return the sample at `offset`, by reading windows of shards one after the other."""
    sizes = order.shard_sizes
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards = permute(np.arange(len(sizes)), len(sizes), key(order.seed, "shards", epoch)).tolist()
    for window in range(0, len(shards), order.window):
        rows = [
            sample
            for shard in shards[window : window + order.window]
            for sample in range(starts[shard], starts[shard + 1])
        ]
        if offset < len(rows):
            rng_key = key(order.seed, "window", epoch, window // order.window)
            return rows[int(permute(np.array([offset]), len(rows), rng_key)[0])]
        offset -= len(rows)
    raise AssertionError("past the end of the epoch")


@given(order=ORDERS, data=st.data())
def test_locate_matches_sequential_order(order: ShuffledOrder, data: st.DataObject) -> None:
    epoch = data.draw(st.integers(0, 1000))
    offset = data.draw(st.integers(0, order.epoch_size - 1))
    _, samples = order.locate(np.array([epoch * order.epoch_size + offset]))
    assert samples.tolist() == [sequential_sample(order, epoch, offset)]


@given(order=ORDERS, epoch=st.integers(0, 5))
def test_window_holds_samples_of_its_shards_only(order: ShuffledOrder, epoch: int) -> None:
    sizes, first = np.array(order.shard_sizes), np.cumsum((0, *order.shard_sizes))
    shard = np.searchsorted(first, epoch_of(order, epoch), side="right") - 1
    # Every window of permuted shards must be exhausted before the next one starts.
    permuted = permute(np.arange(len(sizes)), len(sizes), key(order.seed, "shards", epoch))
    offset = 0
    for w in range(0, len(sizes), order.window):
        mixed = permuted[w : w + order.window]
        count = int(sizes[mixed].sum())
        assert set(shard[offset : offset + count]) <= set(mixed.tolist())
        offset += count


def test_seeds_and_epochs_shuffle_differently() -> None:
    one = ShuffledOrder((50, 50), seed=1, window=2)
    two = ShuffledOrder((50, 50), seed=2, window=2)
    assert not np.array_equal(epoch_of(one, 0), epoch_of(two, 0))
    assert not np.array_equal(epoch_of(one, 0), epoch_of(one, 1))
    assert not np.array_equal(epoch_of(one, 0), np.arange(100))


def test_orders_with_equal_arguments_are_equal() -> None:
    arguments = [(3, 5, 2, 4), [3, 5, 2, 4], np.array([3, 5, 2, 4], np.int32)]
    assert all(ShuffledOrder(sizes, 11, 2) == SMALL for sizes in arguments)
    assert len({ShuffledOrder(sizes, 11, 2) for sizes in arguments}) == 1
    others = [
        ShuffledOrder((3, 5, 4, 2), 11, 2),
        ShuffledOrder((3, 5, 2, 4), 12, 2),
        ShuffledOrder((3, 5, 2, 4), 11, 3),
    ]
    assert all(other != SMALL for other in others)
    assert SMALL != (3, 5, 2, 4)


def test_order_copies_shard_sizes() -> None:
    sizes = np.array([3, 5, 2, 4])
    order = ShuffledOrder(sizes, seed=11, window=2)
    sizes[0] = 100
    assert order == SMALL
    with pytest.raises(ValueError, match="read-only"):
        order.shard_sizes[0] = 100


@given(order=ORDERS)
def test_pickle_keeps_order_without_cache(order: ShuffledOrder) -> None:
    fresh_size = len(pickle.dumps(order))
    epochs = np.arange(3) * order.epoch_size
    _, samples = order.locate(epochs)
    assert len(pickle.dumps(order)) == fresh_size
    again = pickle.loads(pickle.dumps(order))
    assert again == order
    assert np.array_equal(again.locate(epochs)[1], samples)


@given(order=ORDERS, epochs=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_epochs_can_be_located_in_any_order(order: ShuffledOrder, epochs: list[int]) -> None:
    sizes, seed, window = order.shard_sizes, order.seed, order.window
    for epoch in epochs:
        assert np.array_equal(
            epoch_of(order, epoch), epoch_of(ShuffledOrder(sizes, seed, window), epoch)
        )


def test_first_seek_over_a_million_shards_costs_a_few_shuffles() -> None:
    sizes = np.random.default_rng(0).integers(950, 1050, 10**6)
    batch = np.arange(10**9, 10**9 + 32_768)
    seeks, shuffles = [], []
    for seed in range(5):
        # CPU time of this process, relative to numpy's: machines differ, and may be busy.
        start = time.process_time()
        _, samples = ShuffledOrder(sizes, seed, window=64).locate(batch)
        located = time.process_time()
        np.random.default_rng(seed).permutation(10**6)
        seeks.append(located - start)
        shuffles.append(time.process_time() - located)
    assert min(seeks) < 4 * min(shuffles)
    assert len(np.unique(samples)) == len(batch)
    shards = np.unique(np.searchsorted(np.cumsum(sizes), samples, side="right"))
    assert 64 <= len(shards) <= 128  # one window, or two


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 8, 24, 100])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8, 24, 31])
def test_micro_batch_ranges_partition_micro_batches_evenly(
    micro_batches: int, world_size: int
) -> None:
    ranges = [micro_batch_range(micro_batches, world_size, rank) for rank in range(world_size)]
    assert [j for rank_range in ranges for j in rank_range] == list(range(micro_batches))
    lengths = [len(rank_range) for rank_range in ranges]
    assert max(lengths) - min(lengths) <= 1
    assert micro_batches_per_rank(micro_batches, world_size) == max(lengths)
