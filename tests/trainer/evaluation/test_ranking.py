"""Rankings against sorted lists, on random cases with ties, grades and several right answers."""

from __future__ import annotations

import dense_figures as dense
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation import ranking, score_rows
from gigabatch.trainer.evaluation.ranking import Relevance, rank_queries, summary
from gigabatch.trainer.evaluation.score_rows import dot_rows, top_rows

KS = (1, 2, 5, 10, 1000)


def check(found: dict[str, torch.Tensor], wanted: dict[str, list[float]]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-12, err_msg=name)


@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 12),
    keys=st.integers(1, 40),
    spread=st.sampled_from([1, 2, 50]),
    leave_out=st.booleans(),
    budget=st.sampled_from([1, 30, 1 << 20]),
    few=st.sampled_from([0, 2, 16]),
)
def test_judged_pairs_with_grades_ties_and_own_keys(
    seed: int, queries: int, keys: int, spread: int, leave_out: bool, budget: int, few: int
) -> None:
    random = np.random.default_rng(seed)
    q, k = (
        random.integers(-spread, spread + 1, (n, 2)).astype(np.float32) for n in (queries, keys)
    )
    grades = random.choice([-1, 0, 0, 0, 1, 2, 3], (queries, keys))
    own = random.integers(-1, keys, queries) if leave_out else None
    rows, columns = np.nonzero(grades)
    mixed = random.permutation(len(rows))
    rows, columns = rows[mixed], columns[mixed]
    relevance = Relevance.by_pairs(
        torch.from_numpy(rows),
        torch.from_numpy(columns),
        torch.from_numpy(grades[rows, columns]),
        queries,
        None if own is None else torch.from_numpy(own),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_rows, "BUDGET", budget)
        patch.setattr(ranking, "FEW", few)
        score = dot_rows(torch.from_numpy(q), torch.from_numpy(k))
        found = rank_queries(score, relevance, keys, KS)
    check(found, dense.figures(q @ k.T, grades, KS, own))


@pytest.mark.parametrize("groups", [1, 3, 20, 1000])
def test_answers_that_share_an_id(groups: int) -> None:
    random = np.random.default_rng(groups)
    q, k = (random.integers(-2, 3, (n, 3)).astype(np.float32) for n in (31, 57))
    q_ids, k_ids = random.integers(0, groups, 31), random.integers(0, groups, 57)
    relevance = Relevance.by_id(torch.from_numpy(q_ids), torch.from_numpy(k_ids))
    found = rank_queries(dot_rows(*map(torch.from_numpy, (q, k))), relevance, 57, KS)
    check(found, dense.figures(q @ k.T, q_ids[:, None] == k_ids, KS))


def test_scores_that_are_not_numbers_count_against_us() -> None:
    q, k = torch.ones(4, 2), torch.ones(6, 2)
    q[1], k[3] = torch.nan, torch.nan
    k[5] = torch.inf
    ids = torch.tensor([0, 1, 3, 5])
    found = rank_queries(dot_rows(q, k), Relevance.by_id(ids, torch.arange(6)), 6, KS)
    matrix = q.numpy() @ k.numpy().T
    check(found, dense.figures(matrix, ids.numpy()[:, None] == np.arange(6), KS))
    assert found["rank"].tolist() == [6, 6, 6, 2]


def test_a_collapsed_model_finds_nothing() -> None:
    same = torch.ones(30, 4)
    ids = torch.arange(30)
    told = summary(
        rank_queries(dot_rows(same, same), Relevance.by_id(ids, ids), 30, (1, 10)), "i2t_"
    )
    assert told["i2t_recall@10"] == told["i2t_hit@10"] == told["i2t_ndcg@10"] == 0
    assert told["i2t_mean_rank"] == told["i2t_median_rank"] == 30
    assert told["i2t_mrr"] == pytest.approx(1 / 30)


def test_queries_without_a_right_answer_are_left_out_and_none_at_all_is_an_error() -> None:
    keys = torch.eye(3)
    queries = keys[[0, 1]]
    pairs = (torch.tensor([0]), torch.tensor([0]), torch.tensor([1.0]))
    found = rank_queries(dot_rows(queries, keys), Relevance.by_pairs(*pairs, 2), 3, (1,))
    assert summary(found)["recall@1"] == 1
    assert found["recall@1"].isnan().tolist() == [False, True]
    nothing = Relevance.by_pairs(*(p[:0] for p in pairs), 2)
    with pytest.raises(GigabatchError, match="no query has a right answer"):
        summary(rank_queries(dot_rows(queries, keys), nothing, 3, (1,)))


@given(
    seed=st.integers(0, 10**6), k=st.integers(1, 12), keys=st.integers(1, 30), leave=st.booleans()
)
def test_the_best_keys_are_those_of_a_stable_sort(
    seed: int, k: int, keys: int, leave: bool
) -> None:
    random = np.random.default_rng(seed)
    matrix = random.integers(-2, 3, (7, keys)).astype(np.float32)
    matrix[matrix == 2] = -0.0  # equal to 0
    matrix[0, 0] = np.nan
    own = random.integers(-1, keys, 7)
    values, numbers = top_rows(
        lambda part: torch.from_numpy(matrix[part].copy()), 7, keys, k,
        torch.from_numpy(own) if leave else None,
    )  # fmt: skip
    matrix[0, 0] = -np.inf
    if leave:
        matrix[np.flatnonzero(own >= 0), own[own >= 0]] = -np.inf
    order = np.argsort(-matrix, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(matrix, order, 1)
    assert values[:, :keys].tolist() == best.tolist()
    assert numbers[:, :keys].tolist() == np.where(np.isinf(best), -1, order).tolist()
    assert values.shape == numbers.shape == (7, k)
