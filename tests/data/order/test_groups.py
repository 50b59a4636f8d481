from __future__ import annotations

import pickle
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.data.order.groups import GroupedOrder
from gigabatch.data.rng import I64, key, permute

CODES = st.lists(st.sampled_from([-1, 0, 3, 4, 2**62, -(2**63)]), min_size=1, max_size=60)
BATCHES = st.integers(1, 70)
SEEDS = st.integers(0, 2**63 - 1)


def make_order(codes: list[int], batch: int, seed: int = 7) -> GroupedOrder:
    return GroupedOrder(np.array(codes, np.int64), batch, seed)


def locate_batches(grouped: GroupedOrder, batches: int) -> tuple[I64, I64]:
    """Return epochs and samples of the first batches, [batches, batch] each."""
    epochs, samples = grouped.locate(np.arange(batches * grouped.batch))
    assert epochs.dtype == samples.dtype == np.int64
    return epochs.reshape(-1, grouped.batch), samples.reshape(-1, grouped.batch)


def leftover_samples(codes: list[int], batch: int, groups: int) -> int:
    """Count the samples that the first groups leave over."""
    return sum(codes.count(code) % batch for code in sorted(set(codes))[:groups])


def sequential_batches(
    codes: list[int], batch: int, seed: int, epochs: int
) -> list[list[tuple[int, int]]]:
    """Return the batches of the first epochs as (epoch, sample) rows, built one after the other."""
    out: list[list[tuple[int, int]]] = []
    pools: list[tuple[int, int]] = []
    for epoch in range(epochs):
        full, pool = [], []
        for code in sorted(set(codes)):
            members = np.flatnonzero(np.array(codes) == code)
            order = permute(np.arange(len(members)), len(members), key(seed, "group", epoch, code))
            rows = [(epoch, int(sample)) for sample in members[order]]
            full_rows = len(rows) // batch * batch
            full += [rows[i : i + batch] for i in range(0, full_rows, batch)]
            pool += rows[full_rows:]
        split = leftover_samples(codes, batch, key(seed, "pool", epoch) % len(set(codes)))
        pools += pool[split:] + pool[:split]
        while len(pools) >= batch:
            full.append(pools[:batch])
            del pools[:batch]
        order = permute(np.arange(len(full)), len(full), key(seed, "batches", epoch))
        out += [full[number] for number in order]
    return out


@given(codes=CODES, batch=BATCHES, seed=SEEDS, data=st.data())
def test_locate_matches_sequential_order(
    codes: list[int], batch: int, seed: int, data: st.DataObject
) -> None:
    epochs = data.draw(st.integers(1, 8))
    batches = sequential_batches(codes, batch, seed, epochs)
    rows = [row for batch_rows in batches for row in batch_rows]
    grouped = make_order(codes, batch, seed)
    located = grouped.locate(np.arange(len(rows)))
    assert list(zip(*(part.tolist() for part in located), strict=True)) == rows
    if rows:
        positions = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
        located = grouped.locate(np.array(positions, np.int64))
        assert list(zip(*(part.tolist() for part in located), strict=True)) == [
            rows[position] for position in positions
        ]


@given(codes=CODES, batch=BATCHES, seed=SEEDS, epochs=st.integers(1, 12))
def test_epoch_holds_every_sample_once(
    codes: list[int], batch: int, seed: int, epochs: int
) -> None:
    """Except for rows, fewer than a batch, that go to the first mixed batch of a later epoch."""
    batches = epochs * len(codes) // batch
    epoch, sample = locate_batches(make_order(codes, batch, seed), batches)
    counts = Counter(zip(epoch.ravel().tolist(), sample.ravel().tolist(), strict=True))
    assert set(counts.values()) <= {1}
    expected = {(e, s) for e in range(epochs) for s in range(len(codes))}
    waiting = expected - set(counts)
    assert set(counts) <= expected
    assert len(waiting) == epochs * len(codes) - batches * batch < batch


@given(codes=CODES, batch=BATCHES, seed=SEEDS, first=st.integers(0, 10**9))
def test_epoch_has_full_batches_of_every_group(
    codes: list[int], batch: int, seed: int, first: int
) -> None:
    """The other batches of an epoch are the mixed ones, of leftover samples."""
    size = len(codes)
    numbers = np.arange(first * size // batch, (first + 1) * size // batch)
    positions = (numbers[:, None] * batch + np.arange(batch)).ravel()
    epoch, sample = (
        part.reshape(-1, batch) for part in make_order(codes, batch, seed).locate(positions)
    )
    group = np.array(codes)[sample]
    pure = ((group == group[:, :1]) & (epoch == first)).all(1)
    full = Counter(group[pure, 0].tolist())
    leftover = 0
    for code, count in Counter(codes).items():
        assert full[code] >= count // batch
        leftover += count % batch
    mixed = (first + 1) * leftover // batch - first * leftover // batch
    assert len(numbers) == sum(n // batch for n in Counter(codes).values()) + mixed


def test_no_batch_is_mixed_if_groups_divide_evenly() -> None:
    codes = [0] * 30 + [1] * 20 + [-1] * 10
    _, sample = locate_batches(make_order(codes, 10), 60)
    group = np.array(codes)[sample]
    assert (group == group[:, :1]).all()


def test_every_batch_is_mixed_if_groups_are_smaller_than_batch() -> None:
    codes = [0] * 15 + [1] * 15 + [2] * 15
    _, sample = locate_batches(make_order(codes, 40), 60)
    group = np.array(codes)[sample]
    assert (group != group[:, :1]).any(1).all()


@pytest.mark.parametrize("batch", [7, 64, 1000])
def test_batch_may_be_larger_than_source(batch: int) -> None:
    epoch, sample = locate_batches(make_order([5, 5, 9], batch), 4)
    assert np.bincount(sample.ravel()).tolist() == pytest.approx([4 * batch / 3] * 3, abs=1)
    assert epoch.ravel().tolist() == sorted(epoch.ravel().tolist())


def test_leftover_samples_and_split_groups_change_with_epoch() -> None:
    codes = np.repeat([0, 1, 2], [130, 90, 80])
    grouped = GroupedOrder(codes, 100, seed=1)
    epoch, sample = locate_batches(grouped, 3 * 100)
    group = codes[sample]
    mixed = (group != group[:, :1]).any(1)
    assert mixed.sum() == pytest.approx(200, abs=2)
    leftover = sample[mixed & (epoch == epoch[:, :1]).all(1)]
    # 30 of 130 are left over; within 100 epochs, every sample is left over at least once.
    assert len(np.unique(leftover[leftover < 130])) == 130
    # A mixed batch sometimes holds all leftover samples of a group, and sometimes a part.
    for code in range(3):
        assert len(set((group[mixed] == code).sum(1).tolist()) - {0}) >= 2


def test_seeds_and_epochs_shuffle_differently() -> None:
    codes = [0] * 50 + [1] * 50
    first, second = (make_order(codes, 10, seed) for seed in (1, 2))
    one, two = (grouped.locate(np.arange(200))[1] for grouped in (first, second))
    assert not np.array_equal(one, two)
    assert not np.array_equal(one[:100], one[100:])
    # The order of batches changes too, not only that of samples.
    groups = [(row[::10] // 50).tolist() for row in (one[:100], one[100:], two[:100])]
    assert groups[0] != groups[1]
    assert groups[0] != groups[2]
    assert sorted(groups[0]) == [0] * 5 + [1] * 5


def test_seek_to_position_1e9_is_correct_and_fast() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 200, 10**6) * rng.integers(0, 2, 10**6) - 1
    grouped = GroupedOrder(codes, 32_768, seed=3)
    positions = 10**9 // 32_768 * 32_768 + np.arange(32_768)
    seconds = []
    for batch in range(5):
        start = time.process_time()
        grouped.locate(positions + 32_768 * batch)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05
    # All of epochs 999 and 1000, except for samples in batches of the epochs around them.
    first, last = (epoch * 10**6 // 32_768 for epoch in (999, 1001))
    epochs, samples = grouped.locate(np.arange(first * 32_768, last * 32_768))
    assert abs(epochs.mean() - 999.5) < 0.05
    for epoch in (999, 1000):
        epoch_samples = samples[epochs == epoch]
        assert len(np.unique(epoch_samples)) == len(epoch_samples) > 10**6 - 32_768


def test_golden_batches() -> None:
    """The order is a versioned format: a resumed run must see the order it started with."""
    grouped = make_order([5, 5, 5, -1, 7, 7, 7, 7, 5, 5, -1], batch=3)
    epochs, samples = grouped.locate(np.arange(24))
    assert epochs.tolist() == [0] * 11 + [1] * 11 + [2] * 2
    assert samples[:12].tolist() == [6, 4, 7, 5, 10, 3, 9, 1, 8, 0, 2, 10]
    assert samples[12:].tolist() == [3, 0, 2, 6, 7, 5, 9, 1, 8, 4, 7, 10]
    epochs, samples = grouped.locate(10**12 + np.arange(6))
    assert epochs.tolist() == [90909090909] * 6
    assert samples.tolist() == [8, 0, 10, 3, 1, 5]


@given(codes=CODES, batch=BATCHES, seed=SEEDS)
def test_pickle_keeps_order(codes: list[int], batch: int, seed: int) -> None:
    grouped = make_order(codes, batch, seed)
    again = pickle.loads(pickle.dumps(grouped))
    assert again == grouped
    assert hash(again) == hash(grouped)
    positions = np.arange(20)
    assert np.array_equal(again.locate(positions)[1], grouped.locate(positions)[1])


def test_orders_with_equal_arguments_are_equal() -> None:
    grouped = make_order([4, 4, 6], batch=2)
    assert grouped == make_order([4, 4, 6], batch=2)
    others = ([4, 6, 4], [4, 6, 6], [4, 4, 5], [4, 4, 6, 6])
    assert all(make_order(codes, batch=2) != grouped for codes in others)
    assert make_order([4, 4, 6], batch=3) != grouped
    assert make_order([4, 4, 6], batch=2, seed=8) != grouped
    assert grouped != [4, 4, 6]


def test_order_does_not_depend_on_dtype_of_codes() -> None:
    codes = [3, 1, 2, 1, 1, 3] * 9
    narrow, wide = (GroupedOrder(np.array(codes, kind), 4, 1) for kind in (np.int32, np.int64))
    assert narrow == wide
    assert np.array_equal(*(order.locate(np.arange(200))[1] for order in (narrow, wide)))


def test_order_takes_four_bytes_a_sample() -> None:
    codes = np.random.default_rng(0).integers(0, 50, 100_000)
    assert len(pickle.dumps(GroupedOrder(codes, 1000, 1))) < 4 * 100_000 + 10_000
