"""Late interaction against loops over tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import dense_metrics as dense
import numpy as np
import pytest
import torch
import webdataset as wds

from gigabatch.data.text.tokenizer import encode, load_tokenizer
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.context import EvalContext
from gigabatch.trainer.evaluation.embedding import Embedded
from gigabatch.trainer.evaluation.metrics import score_rows as scores
from gigabatch.trainer.evaluation.metrics.retrieval import retrieval_values
from gigabatch.trainer.evaluation.metrics.score_rows import Rows, maxsim_rows, score_pairs
from gigabatch.trainer.evaluation.tasks.text_retrieval import TextRetrieval

SINGLE = World(0, 1, torch.device("cpu"), None)


def tokens(rows: int, length: int, seed: int, spread: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return small integer tokens and their mask; products are exact and many scores tie.

    Padding is large, so that it would win if it counted.
    """
    random = np.random.default_rng(seed)
    values = random.integers(-spread, spread + 1, (rows, length, 3)).astype(np.float32)
    mask = np.arange(length) < random.integers(1, length + 1, (rows, 1))
    values[~mask] = 99
    return values, mask


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_scores_match_loops_over_tokens(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BUDGET", budget)
    random = np.random.default_rng(0)
    (_, q_mask), (_, k_mask) = tokens(7, 3, 0), tokens(7, 6, 1)
    q, k = (random.normal(size=(7, n, 3)).astype(np.float32) for n in (3, 6))
    expected = dense.maxsim(q, q_mask, k, k_mask)
    sides = [Rows(*map(torch.from_numpy, side)) for side in ((q, q_mask), (k, k_mask))]
    np.testing.assert_allclose(score_pairs(*sides).numpy(), expected.diagonal(), rtol=1e-6)
    q_mask[0], k_mask[2] = False, False  # items without real tokens score -inf
    inputs = map(torch.from_numpy, (q, q_mask, k, k_mask))
    actual = maxsim_rows(*inputs)(slice(0, 7)).numpy()
    expected[0], expected[:, 2] = -np.inf, -np.inf
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert actual.dtype == np.float32


@pytest.mark.parametrize("concepts", [1, 4, 1000])
def test_each_direction_averages_over_query_tokens(concepts: int) -> None:
    (image, image_mask), (text, text_mask) = tokens(41, 4, concepts), tokens(41, 5, concepts + 1)
    ids = np.random.default_rng(concepts).integers(0, concepts, 41)
    embedded = Embedded(
        {"image": torch.from_numpy(image), "text": torch.from_numpy(text)},
        {"concept": torch.from_numpy(ids)},
        {"image": torch.from_numpy(image_mask), "text": torch.from_numpy(text_mask)},
    )
    values = retrieval_values(embedded, "concept", SINGLE)
    for way, matrix in (
        ("i2t", dense.maxsim(image, image_mask, text, text_mask)),
        ("t2i", dense.maxsim(text, text_mask, image, image_mask)),
    ):
        same = ids[:, None] == ids
        expected = dense.ranking_metrics(matrix.astype(np.float32), same, (1, 5, 10))
        for name in ("hit@1", "hit@10", "mrr", "ndcg@10", "r_precision", "rank"):
            key = f"{way}_{name.replace('hit', 'recall')}"
            np.testing.assert_allclose(values[key].numpy(), expected[name], rtol=1e-12, err_msg=key)


def text_tokens(context: EvalContext, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the towers' token vectors of texts, and their mask."""
    inputs = encode(load_tokenizer(context.run.tokenizer), texts)
    with torch.no_grad():
        outputs = context.towers({"text": inputs}, None, ["text.tokens"])
    return outputs["text.tokens"].numpy(), inputs[1].numpy()


def test_embedded_set_has_token_masks(untrained: EvalContext) -> None:
    embedded = untrained.embed_for_comparison(["image", "text"], "tokens")
    shard = wds.WebDataset(str(untrained.index.shards[0].name), shardshuffle=False)
    captions = [sample["txt"].decode() for sample in shard]
    expected, mask = text_tokens(untrained, captions)
    np.testing.assert_array_equal(embedded.masks["text"].numpy(), mask)
    np.testing.assert_allclose(embedded.outputs["text"].numpy(), expected, atol=1e-6)
    assert embedded.masks["image"].all()
    assert embedded.masks["image"].shape == embedded.outputs["image"].shape[:2]


def test_text_retrieval_ranks_documents_by_tokens(untrained: EvalContext, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "small", "greek"]
    queries = [" ".join([*random.permutation(words)[: 1 + n % 4], f"{n}"]) for n in range(12)]
    documents = [f"letter {random.choice(words)} {n}" for n in range(12)]
    lines = [
        {"anchor": query, "positive": documents[i], "negative": documents[i - 1]}
        for i, query in enumerate(queries)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    context = replace(untrained, set_argument=str(path))
    result = TextRetrieval().measure(context)
    matrix = dense.maxsim(*text_tokens(context, queries), *text_tokens(context, documents))
    expected = dense.ranking_metrics(matrix.astype(np.float32), np.eye(12), (10,))
    for name in ("mrr", "ndcg@10"):
        np.testing.assert_allclose(result.query_values[name].numpy(), expected[name], rtol=1e-9)
    accuracy = np.mean([matrix[i, i] > matrix[i, i - 1] for i in range(12)])
    assert result.set_metrics["order_accuracy"] == pytest.approx(accuracy)
    assert 0 < accuracy < 1
