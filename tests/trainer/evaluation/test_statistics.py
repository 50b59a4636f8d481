from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.history import best_and_last
from gigabatch.trainer.evaluation.ranking import summary
from gigabatch.trainer.evaluation.statistics import (
    auc,
    intervals,
    order_accuracy,
    rank_variance,
    slices,
)
from gigabatch.trainer.run.folder import RunFolder


@given(seed=st.integers(0, 10**6), values=st.sampled_from([1, 3, 100]))
def test_auc_is_the_share_of_pairs_in_order_ties_half(seed: int, values: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, values, 23).astype(np.float64)
    positive = random.random(23) < 0.4
    positive[:2] = [True, False]
    pairs = list(product(scores[positive], scores[~positive]))
    wanted = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert auc(torch.from_numpy(scores), torch.from_numpy(positive)) == wanted


def test_auc_says_what_it_lacks() -> None:
    with pytest.raises(GigabatchError, match="2 positive ones and 0 negative"):
        auc(torch.ones(2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(GigabatchError, match="NaN"):
        auc(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))


def test_order_accuracy_counts_ties_and_nan_against_us() -> None:
    right = torch.tensor([1.0, 1.0, torch.nan, 2.0])
    wrong = torch.tensor([[0.5, 0.9], [0.0, 1.0], [0.0, 0.0], [1.0, 3.0]])
    assert order_accuracy(right, wrong).tolist() == [1, 0, 0, 0]
    assert order_accuracy(right, wrong[:, 0]).tolist() == [1, 1, 0, 1]


def test_rank_variance_and_its_root_are_told_apart() -> None:
    ranks = np.random.default_rng(0).integers(1, 50, (5, 40))
    found = rank_variance(torch.from_numpy(ranks))
    np.testing.assert_allclose(found["rank_variance"], ranks.var(0))
    np.testing.assert_allclose(found["rank_std"], ranks.std(0))
    assert summary(found)["rank_variance"] == pytest.approx(ranks.var(0).mean())


def test_slices_hold_every_query_once() -> None:
    figures = {"hit": torch.arange(6.0)}
    cut = slices(["b", "a", 3, "b", None, "a"], figures)
    assert {name: each["hit"].tolist() for name, each in cut.items()} == {
        "3": [2], "None": [4], "a": [1, 5], "b": [0, 3],
    }  # fmt: skip


def test_an_interval_of_a_mean_is_as_wide_as_its_standard_error_says() -> None:
    hits = (np.random.default_rng(7).random(400) < 0.3).astype(np.float64)
    low, high = intervals({"hit": torch.from_numpy(hits)}, summary, seed=5)["hit"]
    error = hits.std() / 400**0.5
    assert low == pytest.approx(hits.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(hits.mean() + 1.96 * error, abs=0.15 * error)


def test_intervals_are_those_of_numpy_on_the_same_resamples_and_need_no_more_than_a_seed() -> None:
    ranks = torch.from_numpy(np.random.default_rng(1).integers(1, 99, 51)).double()
    once, again = (intervals({"rank": ranks}, summary, seed=3) for _ in range(2))
    assert once == again
    assert once != intervals({"rank": ranks}, summary, seed=4)
    assert once.keys() == {"mean_rank", "median_rank"}
    draws = np.random.default_rng(2).integers(0, 51, (4000, 51))
    near = np.quantile(ranks.numpy()[draws].mean(1), [0.025, 0.975])
    np.testing.assert_allclose(once["mean_rank"], near, atol=1.5)


def test_intervals_of_groups_draw_their_queries_together() -> None:
    hits = (torch.arange(30) % 3 == 0).double()
    alone = intervals({"hit": hits}, summary, seed=5)
    places = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    fourfold, groups = hits.repeat_interleave(4), torch.arange(30).repeat_interleave(4) - 7
    together = intervals({"hit": fourfold[places]}, summary, seed=5, groups=groups[places])
    assert together["hit"] == pytest.approx(alone["hit"])
    apart = intervals({"hit": fourfold}, summary, seed=5)["hit"]
    assert apart[1] - apart[0] < 0.6 * (together["hit"][1] - together["hit"][0])


def test_intervals_draw_every_query_alike() -> None:
    seen = torch.zeros(5)

    def tell(figures: dict[str, Tensor]) -> dict[str, float]:
        seen.add_(torch.bincount(figures["number"].long(), minlength=5))
        return {"number": 0.0}

    intervals({"number": torch.arange(5.0)}, tell, seed=0)  # type: ignore[arg-type]
    assert seen.sum() == 5000
    assert ((seen - 1000).abs() < 120).all()


def test_best_and_last_of_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(GigabatchError, match="no evaluation"):
        best_and_last(run)
    for step, recall, rank in ((2, 0.5, 9.0), (4, 0.9, 3.0), (6, 0.9, 2.0), (8, 0.4, 7.0)):
        found = {"eval/val/t2i_recall@1": recall, "eval/val/t2i_median_rank": rank}
        run.write_evaluation(step, found)
    run.write_measurement("val-knn", 8, {"eval/val/t2i_recall@1": 1.0})
    told = best_and_last(run)
    assert told["eval/val/t2i_recall@1/best"] == 0.9
    assert told["eval/val/t2i_recall@1/best_step"] == 4
    assert told["eval/val/t2i_recall@1/last"] == 0.4
    assert told["eval/val/t2i_median_rank/best_step"] == 6
    assert told["eval/val/t2i_median_rank/last_step"] == 8
    run.remove_evaluations_after(6)
    assert run.steps_evaluated() == [2, 4, 6]
    assert [p.name for p in (tmp_path / "eval").glob("val-*")] == []
