from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.metrics.ranking import summarize
from gigabatch.trainer.evaluation.metrics.statistics import (
    auc,
    intervals,
    order_accuracy,
    rank_variance,
    slices,
)


@given(seed=st.integers(0, 10**6), values=st.sampled_from([1, 3, 100]))
def test_auc_is_the_share_of_ordered_pairs_with_ties_half(seed: int, values: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, values, 23).astype(np.float64)
    positive = random.random(23) < 0.4
    positive[:2] = [True, False]
    pairs = list(product(scores[positive], scores[~positive]))
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert auc(torch.from_numpy(scores), torch.from_numpy(positive)) == expected


def test_auc_raises_on_one_class_and_on_nan() -> None:
    with pytest.raises(GigabatchError, match="2 positive and 0 negative"):
        auc(torch.ones(2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(GigabatchError, match="NaN"):
        auc(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))


def test_order_accuracy_counts_ties_and_nan_as_wrong() -> None:
    correct = torch.tensor([1.0, 1.0, torch.nan, 2.0])
    changed = torch.tensor([[0.5, 0.9], [0.0, 1.0], [0.0, 0.0], [1.0, 3.0]])
    assert order_accuracy(correct, changed).tolist() == [1, 0, 0, 0]
    assert order_accuracy(correct, changed[:, 0]).tolist() == [1, 1, 0, 1]


def test_rank_variance_and_standard_deviation_match_numpy() -> None:
    ranks = np.random.default_rng(0).integers(1, 50, (5, 40))
    values = rank_variance(torch.from_numpy(ranks))
    np.testing.assert_allclose(values["rank_variance"], ranks.var(0))
    np.testing.assert_allclose(values["rank_std"], ranks.std(0))
    assert summarize(values)["rank_variance"] == pytest.approx(ranks.var(0).mean())


def test_slices_contain_every_query_once() -> None:
    split = slices(["b", "a", 3, "b", None, "a"], {"hit": torch.arange(6.0)})
    assert {name: values["hit"].tolist() for name, values in split.items()} == {
        "3": [2], "None": [4], "a": [1, 5], "b": [0, 3],
    }  # fmt: skip


def test_interval_of_a_mean_matches_its_standard_error() -> None:
    hits = (np.random.default_rng(7).random(400) < 0.3).astype(np.float64)
    low, high = intervals({"hit": torch.from_numpy(hits)}, summarize, seed=5)["hit"]
    error = hits.std() / 400**0.5
    assert low == pytest.approx(hits.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(hits.mean() + 1.96 * error, abs=0.15 * error)


def test_intervals_depend_only_on_the_seed_and_match_numpy() -> None:
    ranks = torch.from_numpy(np.random.default_rng(1).integers(1, 99, 51)).double()
    first, second = (intervals({"rank": ranks}, summarize, seed=3) for _ in range(2))
    assert first == second
    assert first != intervals({"rank": ranks}, summarize, seed=4)
    assert first.keys() == {"mean_rank", "median_rank"}
    draws = np.random.default_rng(2).integers(0, 51, (4000, 51))
    expected = np.quantile(ranks.numpy()[draws].mean(1), [0.025, 0.975])
    np.testing.assert_allclose(first["mean_rank"], expected, atol=1.5)


def test_intervals_of_groups_draw_their_queries_together() -> None:
    hits = (torch.arange(30) % 3 == 0).double()
    single = intervals({"hit": hits}, summarize, seed=5)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    repeated, groups = hits.repeat_interleave(4), torch.arange(30).repeat_interleave(4) - 7
    grouped = intervals({"hit": repeated[order]}, summarize, seed=5, groups=groups[order])
    assert grouped["hit"] == pytest.approx(single["hit"])
    ungrouped = intervals({"hit": repeated}, summarize, seed=5)["hit"]
    assert ungrouped[1] - ungrouped[0] < 0.6 * (grouped["hit"][1] - grouped["hit"][0])


def test_intervals_draw_all_queries_equally_often() -> None:
    counts = torch.zeros(5)

    def count(values: dict[str, Tensor]) -> dict[str, float]:
        counts.add_(torch.bincount(values["number"].long(), minlength=5))
        return {"number": 0.0}

    intervals({"number": torch.arange(5.0)}, count, seed=0)  # type: ignore[arg-type]
    assert counts.sum() == 5000
    assert ((counts - 1000).abs() < 120).all()
