from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import run_ranks

from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.retrieval import _ranks, _summary

ALONE = World(0, 1, torch.device("cpu"), None)


def brute_force(scores: np.ndarray, ids: np.ndarray) -> list[int]:
    """One plus the wrong answers that score no less than the best right one, query by query."""
    ranks = []
    for i, row in enumerate(scores):
        right = [s for s, other in zip(row, ids, strict=True) if other == ids[i]]
        wrong = [s for s, other in zip(row, ids, strict=True) if other != ids[i]]
        ranks.append(1 + sum(s >= max(right) for s in wrong))
    return ranks


@pytest.mark.parametrize("concepts", [1, 3, 20, 1000])
def test_ranks_equal_brute_force_with_ties_and_several_right_answers(concepts: int) -> None:
    random = np.random.default_rng(concepts)
    # Small whole numbers: dot products are exact, and many of them tie.
    queries, keys = (random.integers(-2, 3, (57, 3)).astype(np.float32) for _ in range(2))
    ids = random.integers(0, concepts, 57)
    ranks = _ranks(*map(torch.from_numpy, (queries, keys, ids)), ALONE)
    assert ranks.tolist() == brute_force(queries @ keys.T, ids)


def test_equal_scores_everywhere_count_against_us() -> None:
    same = torch.ones(30, 4)
    ranks = _ranks(same, same, torch.arange(30), ALONE)
    assert ranks.tolist() == [30] * 30
    assert _summary("i2t", ranks)["i2t_recall@10"] == 0.0


def test_scores_that_are_not_numbers_count_against_us() -> None:
    broken = torch.full((5, 4), torch.nan)
    assert _ranks(broken, broken, torch.arange(5), ALONE).tolist() == [5] * 5


def test_recall_and_median_of_known_ranks() -> None:
    summary = _summary("t2i", torch.tensor([1, 2, 5, 6, 11]))
    assert summary == {
        "t2i_recall@1": 0.2, "t2i_recall@5": 0.6, "t2i_recall@10": 0.8, "t2i_median_rank": 5.0,
    }  # fmt: skip


@pytest.mark.slow
def test_ranks_are_the_same_on_one_and_three_processes() -> None:
    probe = Path(__file__).with_name("retrieval_probe.py")
    assert run_ranks(probe, 3) == run_ranks(probe, 1)
