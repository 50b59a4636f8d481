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


def made(codes: list[int], batch: int, seed: int = 7) -> GroupedOrder:
    return GroupedOrder(np.array(codes, np.int64), batch, seed)


def located(grouped: GroupedOrder, batches: int) -> tuple[I64, I64]:
    """(epochs, samples) of the first batches, [batches, batch]."""
    epochs, samples = grouped.locate(np.arange(batches * grouped.batch))
    assert epochs.dtype == samples.dtype == np.int64
    return epochs.reshape(-1, grouped.batch), samples.reshape(-1, grouped.batch)


def left_before(codes: list[int], batch: int, groups: int) -> int:
    """Samples that the first groups leave over."""
    return sum(codes.count(code) % batch for code in sorted(set(codes))[:groups])


def walked(
    codes: list[int], batch: int, seed: int, epochs: int
) -> tuple[list[list[tuple[int, int]]], int]:
    """The batches of the first epochs as (epoch, sample) rows, by filling one after the other; and
    how many rows are left over."""
    out: list[list[tuple[int, int]]] = []
    stream: list[tuple[int, int]] = []
    for epoch in range(epochs):
        full, pool = [], []
        for code in sorted(set(codes)):
            members = np.flatnonzero(np.array(codes) == code)
            order = permute(np.arange(len(members)), len(members), key(seed, "group", epoch, code))
            rows = [(epoch, int(sample)) for sample in members[order]]
            cut = len(rows) // batch * batch
            full += [rows[i : i + batch] for i in range(0, cut, batch)]
            pool += rows[cut:]
        turn = left_before(codes, batch, key(seed, "pool", epoch) % len(set(codes)))
        stream += pool[turn:] + pool[:turn]
        while len(stream) >= batch:
            full.append(stream[:batch])
            del stream[:batch]
        order = permute(np.arange(len(full)), len(full), key(seed, "batches", epoch))
        out += [full[place] for place in order]
    return out, len(stream)


@given(codes=CODES, batch=BATCHES, seed=SEEDS, data=st.data())
def test_a_look_up_equals_the_walk(
    codes: list[int], batch: int, seed: int, data: st.DataObject
) -> None:
    epochs = data.draw(st.integers(1, 8))
    batches, _ = walked(codes, batch, seed, epochs)
    rows = [row for each in batches for row in each]
    grouped = made(codes, batch, seed)
    found = grouped.locate(np.arange(len(rows)))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == rows
    if rows:
        places = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
        found = grouped.locate(np.array(places, np.int64))
        assert list(zip(*(part.tolist() for part in found), strict=True)) == [
            rows[place] for place in places
        ]


@given(codes=CODES, batch=BATCHES, seed=SEEDS, epochs=st.integers(1, 12))
def test_each_sample_comes_once_an_epoch(
    codes: list[int], batch: int, seed: int, epochs: int
) -> None:
    """Up to the rows, fewer than a batch, that wait for the first mixed batch after the edge."""
    batches = epochs * len(codes) // batch
    epoch, sample = located(made(codes, batch, seed), batches)
    came = Counter(zip(epoch.ravel().tolist(), sample.ravel().tolist(), strict=True))
    assert set(came.values()) <= {1}
    every = {(e, s) for e in range(epochs) for s in range(len(codes))}
    waiting = every - set(came)
    assert set(came) <= every
    assert len(waiting) == epochs * len(codes) - batches * batch < batch


@given(codes=CODES, batch=BATCHES, seed=SEEDS, first=st.integers(0, 10**9))
def test_an_epoch_has_its_full_batches_of_each_group(
    codes: list[int], batch: int, seed: int, first: int
) -> None:
    """From any epoch on: what is not of one group is of what is left over."""
    size = len(codes)
    numbers = np.arange(first * size // batch, (first + 1) * size // batch)
    positions = (numbers[:, None] * batch + np.arange(batch)).ravel()
    epoch, sample = (part.reshape(-1, batch) for part in made(codes, batch, seed).locate(positions))
    group = np.array(codes)[sample]
    pure = ((group == group[:, :1]) & (epoch == first)).all(1)
    full = Counter(group[pure, 0].tolist())
    left = 0
    for code, count in Counter(codes).items():
        assert full[code] >= count // batch
        left += count % batch
    mixed = (first + 1) * left // batch - first * left // batch
    assert len(numbers) == sum(n // batch for n in Counter(codes).values()) + mixed


def test_no_batch_is_mixed_where_nothing_is_left_over() -> None:
    codes = [0] * 30 + [1] * 20 + [-1] * 10
    _, sample = located(made(codes, 10), 60)
    group = np.array(codes)[sample]
    assert (group == group[:, :1]).all()


def test_every_batch_is_mixed_where_two_of_a_group_would_not_fill_it() -> None:
    codes = [0] * 15 + [1] * 15 + [2] * 15
    _, sample = located(made(codes, 40), 60)
    group = np.array(codes)[sample]
    assert (group != group[:, :1]).any(1).all()


@pytest.mark.parametrize("batch", [7, 64, 1000])
def test_a_batch_may_exceed_the_source(batch: int) -> None:
    epoch, sample = located(made([5, 5, 9], batch), 4)
    assert np.bincount(sample.ravel()).tolist() == pytest.approx([4 * batch / 3] * 3, abs=1)
    assert epoch.ravel().tolist() == sorted(epoch.ravel().tolist())


def test_other_samples_are_left_over_each_epoch_and_other_groups_cut() -> None:
    codes = np.repeat([0, 1, 2], [130, 90, 80])
    grouped = GroupedOrder(codes, 100, seed=1)
    epoch, sample = located(grouped, 3 * 100)
    group = codes[sample]
    mixed = (group != group[:, :1]).any(1)
    assert mixed.sum() == pytest.approx(200, abs=2)
    left = sample[mixed & (epoch == epoch[:, :1]).all(1)]
    # Of 130, 30 are left over: each of them in 100 epochs at times.
    assert len(np.unique(left[left < 130])) == 130
    # Of each group a mixed batch holds all that was left over at times, and a part at others.
    for code in range(3):
        assert len(set((group[mixed] == code).sum(1).tolist()) - {0}) >= 2


def test_seeds_and_epochs_shuffle_differently() -> None:
    codes = [0] * 50 + [1] * 50
    first, second = (made(codes, 10, seed) for seed in (1, 2))
    one, two = (grouped.locate(np.arange(200))[1] for grouped in (first, second))
    assert not np.array_equal(one, two)
    assert not np.array_equal(one[:100], one[100:])
    # The order of batches too, not only of samples.
    groups = [(row[::10] // 50).tolist() for row in (one[:100], one[100:], two[:100])]
    assert groups[0] != groups[1]
    assert groups[0] != groups[2]
    assert sorted(groups[0]) == [0] * 5 + [1] * 5


def test_seeking_to_position_a_billion_is_fast_and_goes_on_where_the_walk_would() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 200, 10**6) * rng.integers(0, 2, 10**6) - 1
    grouped = GroupedOrder(codes, 32_768, seed=3)
    positions = 10**9 // 32_768 * 32_768 + np.arange(32_768)
    took = []
    for batch in range(5):
        began = time.process_time()
        grouped.locate(positions + 32_768 * batch)
        took.append(time.process_time() - began)
    assert min(took) < 0.05
    # Epochs 999 and 1000 whole, and what either borrows of its neighbour.
    first, last = (epoch * 10**6 // 32_768 for epoch in (999, 1001))
    epochs, samples = grouped.locate(np.arange(first * 32_768, last * 32_768))
    assert abs(epochs.mean() - 999.5) < 0.05
    for epoch in (999, 1000):
        own = samples[epochs == epoch]
        assert len(np.unique(own)) == len(own) > 10**6 - 32_768


def test_golden_batches() -> None:
    """The order is a versioned format: a resumed run must see the order that it began with."""
    grouped = made([5, 5, 5, -1, 7, 7, 7, 7, 5, 5, -1], batch=3)
    epochs, samples = grouped.locate(np.arange(24))
    assert epochs.tolist() == [0] * 11 + [1] * 11 + [2] * 2
    assert samples[:12].tolist() == [6, 4, 7, 5, 10, 3, 9, 1, 8, 0, 2, 10]
    assert samples[12:].tolist() == [3, 0, 2, 6, 7, 5, 9, 1, 8, 4, 7, 10]
    epochs, samples = grouped.locate(10**12 + np.arange(6))
    assert epochs.tolist() == [90909090909] * 6
    assert samples.tolist() == [8, 0, 10, 3, 1, 5]


@given(codes=CODES, batch=BATCHES, seed=SEEDS)
def test_pickling_keeps_the_order(codes: list[int], batch: int, seed: int) -> None:
    grouped = made(codes, batch, seed)
    again = pickle.loads(pickle.dumps(grouped))
    assert again == grouped
    assert hash(again) == hash(grouped)
    positions = np.arange(20)
    assert np.array_equal(again.locate(positions)[1], grouped.locate(positions)[1])


def test_it_is_a_value() -> None:
    grouped = made([4, 4, 6], batch=2)
    assert grouped == made([4, 4, 6], batch=2)
    others = ([4, 6, 4], [4, 6, 6], [4, 4, 5], [4, 4, 6, 6])
    assert all(made(codes, batch=2) != grouped for codes in others)
    assert made([4, 4, 6], batch=3) != grouped
    assert made([4, 4, 6], batch=2, seed=8) != grouped
    assert grouped != [4, 4, 6]


def test_small_and_large_codes_give_the_same_order() -> None:
    codes = [3, 1, 2, 1, 1, 3] * 9
    narrow, wide = (GroupedOrder(np.array(codes, kind), 4, 1) for kind in (np.int32, np.int64))
    assert narrow == wide
    assert np.array_equal(*(each.locate(np.arange(200))[1] for each in (narrow, wide)))


def test_it_holds_one_small_number_a_sample() -> None:
    codes = np.random.default_rng(0).integers(0, 50, 100_000)
    assert len(pickle.dumps(GroupedOrder(codes, 1000, 1))) < 4 * 100_000 + 10_000
