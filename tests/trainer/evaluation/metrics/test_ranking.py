"""Ranking metrics against sorted lists, on random cases with ties, grades and several positives."""

from __future__ import annotations

import dense_metrics as dense
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.metrics import ranking, score_rows
from gigabatch.trainer.evaluation.metrics.ranking import Relevance, rank_queries, summarize
from gigabatch.trainer.evaluation.metrics.score_rows import dot_rows, top_keys

KS = (1, 2, 5, 10, 1000)


def check(actual: dict[str, torch.Tensor], expected: dict[str, list[float]]) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name].numpy(), values, rtol=1e-12, err_msg=name)


@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 12),
    keys=st.integers(1, 40),
    spread=st.sampled_from([1, 2, 50]),
    leave_out=st.booleans(),
    budget=st.sampled_from([1, 30, 1 << 20]),
    max_direct=st.sampled_from([0, 2, 16]),
)
def test_judged_pairs_with_grades_ties_and_excluded_keys_match_sorted_lists(
    seed: int, queries: int, keys: int, spread: int, leave_out: bool, budget: int, max_direct: int
) -> None:
    random = np.random.default_rng(seed)
    q, k = (
        random.integers(-spread, spread + 1, (n, 2)).astype(np.float32) for n in (queries, keys)
    )
    grades = random.choice([-1, 0, 0, 0, 1, 2, 3], (queries, keys))
    excluded = random.integers(-1, keys, queries) if leave_out else None
    rows, columns = np.nonzero(grades)
    shuffled = random.permutation(len(rows))
    rows, columns = rows[shuffled], columns[shuffled]
    relevance = Relevance.by_pairs(
        torch.from_numpy(rows),
        torch.from_numpy(columns),
        torch.from_numpy(grades[rows, columns]),
        queries,
        None if excluded is None else torch.from_numpy(excluded),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_rows, "BUDGET", budget)
        patch.setattr(ranking, "MAX_DIRECT", max_direct)
        score = dot_rows(torch.from_numpy(q), torch.from_numpy(k))
        actual = rank_queries(score, relevance, keys, KS)
    check(actual, dense.ranking_metrics(q @ k.T, grades, KS, excluded))


@pytest.mark.parametrize("groups", [1, 3, 20, 1000])
def test_positives_that_share_an_id_match_sorted_lists(groups: int) -> None:
    random = np.random.default_rng(groups)
    q, k = (random.integers(-2, 3, (n, 3)).astype(np.float32) for n in (31, 57))
    q_ids, k_ids = random.integers(0, groups, 31), random.integers(0, groups, 57)
    relevance = Relevance.by_id(torch.from_numpy(q_ids), torch.from_numpy(k_ids))
    actual = rank_queries(dot_rows(*map(torch.from_numpy, (q, k))), relevance, 57, KS)
    check(actual, dense.ranking_metrics(q @ k.T, q_ids[:, None] == k_ids, KS))


def test_nan_scores_count_against_the_model() -> None:
    q, k = torch.ones(4, 2), torch.ones(6, 2)
    q[1], k[3] = torch.nan, torch.nan
    k[5] = torch.inf
    ids = torch.tensor([0, 1, 3, 5])
    actual = rank_queries(dot_rows(q, k), Relevance.by_id(ids, torch.arange(6)), 6, KS)
    matrix = q.numpy() @ k.numpy().T
    check(actual, dense.ranking_metrics(matrix, ids.numpy()[:, None] == np.arange(6), KS))
    assert actual["rank"].tolist() == [6, 6, 6, 2]


def test_collapsed_model_gets_the_worst_metrics() -> None:
    same = torch.ones(30, 4)
    ids = torch.arange(30)
    values = rank_queries(dot_rows(same, same), Relevance.by_id(ids, ids), 30, (1, 10))
    metrics = summarize(values, "i2t_")
    assert metrics["i2t_recall@10"] == metrics["i2t_hit@10"] == metrics["i2t_ndcg@10"] == 0
    assert metrics["i2t_mean_rank"] == metrics["i2t_median_rank"] == 30
    assert metrics["i2t_mrr"] == pytest.approx(1 / 30)


def test_summarize_skips_queries_without_relevant_items_and_raises_if_none_remain() -> None:
    keys = torch.eye(3)
    queries = keys[[0, 1]]
    pairs = (torch.tensor([0]), torch.tensor([0]), torch.tensor([1.0]))
    values = rank_queries(dot_rows(queries, keys), Relevance.by_pairs(*pairs, 2), 3, (1,))
    assert summarize(values)["recall@1"] == 1
    assert values["recall@1"].isnan().tolist() == [False, True]
    empty = Relevance.by_pairs(*(p[:0] for p in pairs), 2)
    with pytest.raises(GigabatchError, match="no query has a relevant item"):
        summarize(rank_queries(dot_rows(queries, keys), empty, 3, (1,)))


@given(
    seed=st.integers(0, 10**6), k=st.integers(1, 12), keys=st.integers(1, 30), leave=st.booleans()
)
def test_top_keys_match_a_stable_sort(seed: int, k: int, keys: int, leave: bool) -> None:
    random = np.random.default_rng(seed)
    matrix = random.integers(-2, 3, (7, keys)).astype(np.float32)
    matrix[matrix == 2] = -0.0  # equal to 0
    matrix[0, 0] = np.nan
    excluded = random.integers(-1, keys, 7)
    values, indices = top_keys(
        lambda part: torch.from_numpy(matrix[part].copy()), 7, keys, k,
        torch.from_numpy(excluded) if leave else None,
    )  # fmt: skip
    matrix[0, 0] = -np.inf
    if leave:
        matrix[np.flatnonzero(excluded >= 0), excluded[excluded >= 0]] = -np.inf
    order = np.argsort(-matrix, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(matrix, order, 1)
    assert values[:, :keys].tolist() == best.tolist()
    assert indices[:, :keys].tolist() == np.where(np.isinf(best), -1, order).tolist()
    assert values.shape == indices.shape == (7, k)
