from __future__ import annotations

import dense_figures as dense
import numpy as np
import pytest
import torch

from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.embedding import Embedded
from gigabatch.trainer.evaluation.retrieval import (
    describe,
    joint_figures,
    retrieval_figures,
    retrieval_summary,
)

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.mark.parametrize("concepts", [1, 3, 20, 1000])
def test_both_ways_equal_sorted_lists(concepts: int) -> None:
    random = np.random.default_rng(concepts)
    # Small whole numbers: dot products are exact, and many of them tie.
    image, text = (random.integers(-2, 3, (57, 3)).astype(np.float32) for _ in range(2))
    ids = random.integers(0, concepts, 57)
    found = Embedded(
        {"image": torch.from_numpy(image), "text": torch.from_numpy(text)},
        {"concept": torch.from_numpy(ids)},
    )
    figures = retrieval_figures(found, "concept", ALONE)
    told = retrieval_summary(figures, 57)
    for way, scores in (("i2t", image @ text.T), ("t2i", text @ image.T)):
        wanted = dense.figures(scores, ids[:, None] == ids, (1, 5, 10))
        for name in ("hit@1", "hit@5", "hit@10", "mrr", "ndcg@10", "r_precision"):
            own = f"{way}_{name.replace('hit', 'recall')}"
            np.testing.assert_allclose(figures[own].numpy(), wanted[name], rtol=1e-12)
            assert told[own] == pytest.approx(np.mean(wanted[name]))
        assert told[f"{way}_mean_rank"] == pytest.approx(np.mean(wanted["rank"]))
        assert told[f"{way}_median_rank"] == sorted(wanted["rank"])[28]
    assert told["mean_recall@10"] == (told["i2t_recall@10"] + told["t2i_recall@10"]) / 2
    assert told["candidates"] == 57


@pytest.mark.parametrize("score", ["product", "sum"])
@pytest.mark.parametrize("concepts", [1, 3, 1000])
def test_one_modality_by_two_equals_sorted_lists(score: str, concepts: int) -> None:
    random = np.random.default_rng(concepts)
    a, b, c = (random.integers(-2, 3, (43, 3)).astype(np.float32) for _ in range(3))
    ids = random.integers(0, concepts, 43)
    found = Embedded(
        {name: torch.from_numpy(rows) for name, rows in {"b": b, "a": a, "c": c}.items()},
        {"concept": torch.from_numpy(ids)},
    )
    scores = np.empty((43, 43))
    for i, j in np.ndindex(43, 43):
        scores[i, j] = (
            sum(a[i, d] * c[i, d] * b[j, d] for d in range(3))
            if score == "product"
            else a[i] @ b[j] + c[i] @ b[j]
        )
    figures = joint_figures(found, ["a", "c"], "b", score, "concept", ALONE)
    told = retrieval_summary(figures, 43)
    wanted = dense.figures(scores, ids[:, None] == ids, (1, 5, 10))
    for name in ("hit@1", "hit@5", "hit@10", "mrr", "ndcg@10", "r_precision"):
        own = f"a+c2b_{name.replace('hit', 'recall')}"
        np.testing.assert_allclose(figures[own].numpy(), wanted[name], rtol=1e-12)
        assert told[own] == pytest.approx(np.mean(wanted[name]))
    assert told["a+c2b_mean_rank"] == pytest.approx(np.mean(wanted["rank"]))
    assert "mean_recall@10" not in told  # there is no other way
    assert f"recall@10 {told['a+c2b_recall@10']:.3f} (a and c to b; 43 " in describe("s", told)
