from __future__ import annotations

import dense_metrics as dense
import numpy as np
import pytest
import torch

from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.embedding import Embedded
from gigabatch.trainer.evaluation.metrics.retrieval import (
    describe_retrieval,
    joint_retrieval_values,
    retrieval_values,
    summarize_retrieval,
)

SINGLE = World(0, 1, torch.device("cpu"), None)


@pytest.mark.parametrize("concepts", [1, 3, 20, 1000])
def test_both_directions_match_sorted_lists(concepts: int) -> None:
    random = np.random.default_rng(concepts)
    # Small integers make dot products exact, and many of them tie.
    image, text = (random.integers(-2, 3, (57, 3)).astype(np.float32) for _ in range(2))
    ids = random.integers(0, concepts, 57)
    embedded = Embedded(
        {"image": torch.from_numpy(image), "text": torch.from_numpy(text)},
        {"concept": torch.from_numpy(ids)},
    )
    values = retrieval_values(embedded, "concept", SINGLE)
    metrics = summarize_retrieval(values, 57)
    for way, scores in (("i2t", image @ text.T), ("t2i", text @ image.T)):
        expected = dense.ranking_metrics(scores, ids[:, None] == ids, (1, 5, 10))
        for name in ("hit@1", "hit@5", "hit@10", "mrr", "ndcg@10", "r_precision"):
            key = f"{way}_{name.replace('hit', 'recall')}"
            np.testing.assert_allclose(values[key].numpy(), expected[name], rtol=1e-12)
            assert metrics[key] == pytest.approx(np.mean(expected[name]))
        assert metrics[f"{way}_mean_rank"] == pytest.approx(np.mean(expected["rank"]))
        assert metrics[f"{way}_median_rank"] == sorted(expected["rank"])[28]
    assert metrics["mean_recall@10"] == (metrics["i2t_recall@10"] + metrics["t2i_recall@10"]) / 2
    assert metrics["candidates"] == 57


@pytest.mark.parametrize("score", ["product", "sum"])
@pytest.mark.parametrize("concepts", [1, 3, 1000])
def test_joint_retrieval_matches_sorted_lists(score: str, concepts: int) -> None:
    random = np.random.default_rng(concepts)
    a, b, c = (random.integers(-2, 3, (43, 3)).astype(np.float32) for _ in range(3))
    ids = random.integers(0, concepts, 43)
    embedded = Embedded(
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
    values = joint_retrieval_values(embedded, ["a", "c"], "b", score, "concept", SINGLE)
    metrics = summarize_retrieval(values, 43)
    expected = dense.ranking_metrics(scores, ids[:, None] == ids, (1, 5, 10))
    for name in ("hit@1", "hit@5", "hit@10", "mrr", "ndcg@10", "r_precision"):
        key = f"a+c2b_{name.replace('hit', 'recall')}"
        np.testing.assert_allclose(values[key].numpy(), expected[name], rtol=1e-12)
        assert metrics[key] == pytest.approx(np.mean(expected[name]))
    assert metrics["a+c2b_mean_rank"] == pytest.approx(np.mean(expected["rank"]))
    assert "mean_recall@10" not in metrics  # one direction only
    line = f"recall@10 {metrics['a+c2b_recall@10']:.3f} (a and c to b; 43 "
    assert line in describe_retrieval("s", metrics)
