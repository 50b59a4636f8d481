"""Late interaction against loops over tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import dense_figures as dense
import numpy as np
import pytest
import torch
import webdataset as wds

from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.tokenizer import encode, load_tokenizer
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation import score_rows as scores
from gigabatch.trainer.evaluation.embedding import Embedded, Reading
from gigabatch.trainer.evaluation.retrieval import retrieval_figures
from gigabatch.trainer.evaluation.score_rows import Rows, maxsim_rows, score_pairs
from gigabatch.trainer.evaluation.settings import task_settings
from gigabatch.trainer.evaluation.taps import compared, place_compared
from gigabatch.trainer.evaluation.task import Subject
from gigabatch.trainer.evaluation.tasks import measure
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.towers import build_towers

ALONE = World(0, 1, torch.device("cpu"), None)


def tokens(rows: int, length: int, seed: int, spread: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Small whole numbers: products are exact, and many scores tie. Pads would win if they
    counted."""
    random = np.random.default_rng(seed)
    values = random.integers(-spread, spread + 1, (rows, length, 3)).astype(np.float32)
    real = np.arange(length) < random.integers(1, length + 1, (rows, 1))
    values[~real] = 99
    return values, real


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_scores_equal_loops_over_tokens(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BUDGET", budget)
    random = np.random.default_rng(0)
    (q, real_q), (k, real_k) = tokens(7, 3, 0), tokens(7, 6, 1)
    q, k = (random.normal(size=each.shape).astype(np.float32) for each in (q, k))
    wanted = dense.maxsim(q, real_q, k, real_k)
    own = score_pairs(*(Rows(*map(torch.from_numpy, each)) for each in ((q, real_q), (k, real_k))))
    np.testing.assert_allclose(own.numpy(), wanted.diagonal(), rtol=1e-6)
    real_q[0], real_k[2] = False, False  # an item without a token is nobody's match
    inputs = map(torch.from_numpy, (q, real_q, k, real_k))
    found = maxsim_rows(*inputs)(slice(0, 7)).numpy()
    wanted[0], wanted[:, 2] = -np.inf, -np.inf
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("concepts", [1, 4, 1000])
def test_each_way_asks_with_its_own_tokens(concepts: int) -> None:
    (image, places), (text, words) = tokens(41, 4, concepts), tokens(41, 5, concepts + 1)
    ids = np.random.default_rng(concepts).integers(0, concepts, 41)
    found = Embedded(
        {"image": torch.from_numpy(image), "text": torch.from_numpy(text)},
        {"concept": torch.from_numpy(ids)},
        {"image": torch.from_numpy(places), "text": torch.from_numpy(words)},
    )
    figures = retrieval_figures(found, "concept", ALONE)
    for way, matrix in (
        ("i2t", dense.maxsim(image, places, text, words)),
        ("t2i", dense.maxsim(text, words, image, places)),
    ):
        wanted = dense.figures(matrix.astype(np.float32), ids[:, None] == ids, (1, 5, 10))
        for name in ("hit@1", "hit@10", "mrr", "ndcg@10", "r_precision", "rank"):
            own = f"{way}_{name.replace('hit', 'recall')}"
            np.testing.assert_allclose(figures[own].numpy(), wanted[name], rtol=1e-12, err_msg=own)


@pytest.fixture
def untrained(tiny: Path) -> Subject:
    """The towers of a run by late interaction as they begin, on its set `val`."""
    config = load_config(tiny, ["objective={name: late_interaction}", "data.workers=0"])
    run = create_run(config, "r")
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    towers = build_towers(config, load_tokenizer(run.tokenizer).get_vocab_size()).eval()
    return Subject(run, config, towers, ALONE, "val", 0)


def tokens_of(subject: Subject, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    inputs = encode(load_tokenizer(subject.run.tokenizer), texts)
    with torch.no_grad():
        found = subject.towers({"text": inputs}, None, ["text.tokens"])
    return found["text.tokens"].numpy(), inputs[1].numpy()


def test_a_set_comes_with_the_masks_of_its_tokens(untrained: Subject) -> None:
    found = untrained.embed_compared(Reading(), "tokens")
    shard = wds.WebDataset(str(untrained.index.shards[0].name), shardshuffle=False)
    wanted, real = tokens_of(untrained, [sample["txt"].decode() for sample in shard])
    np.testing.assert_array_equal(found.masks["text"].numpy(), real)
    np.testing.assert_allclose(found.taps["text"].numpy(), wanted, atol=1e-6)
    assert found.masks["image"].all()
    assert found.masks["image"].shape == found.taps["image"].shape[:2]


def test_documents_are_ranked_by_tokens(untrained: Subject, tmp_path: Path) -> None:
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
    subject = replace(untrained, on=str(path))
    found = measure("text-retrieval", subject, task_settings("text-retrieval", []))
    matrix = dense.maxsim(*tokens_of(subject, queries), *tokens_of(subject, documents))
    wanted = dense.figures(matrix.astype(np.float32), np.eye(12), (10,))
    for name in ("mrr", "ndcg@10"):
        np.testing.assert_allclose(found.figures[name].numpy(), wanted[name], rtol=1e-9)
    right = np.mean([matrix[i, i] > matrix[i, i - 1] for i in range(12)])
    assert found.told["order_accuracy"] == pytest.approx(right)
    assert 0 < right < 1


@pytest.mark.parametrize(
    ("objective", "place"),
    [
        ("{name: infonce}", "head"),
        ("{name: late_interaction}", "tokens"),
        ("{name: late_interaction, taps: [text.tokens, image.tokens]}", "tokens"),
        ("{name: late_interaction, taps: [image, text.tokens]}", "head"),
        ("{name: sum, terms: [{name: late_interaction}, {name: infonce}]}", "head"),
        (
            "{name: sum, terms: [{name: late_interaction}, "
            "{name: supcon, taps: [image, image@1]}]}",
            "tokens",
        ),
    ],
)
def test_what_is_not_trained_is_not_measured(tiny: Path, objective: str, place: str) -> None:
    config = load_config(tiny, [f"objective={objective}"])
    assert place_compared(config, ["image", "text"]) == place
    assert place_compared(config, ["image", "text"], "head") == "head"


def test_tokens_are_those_of_the_towers_and_must_be_there(tiny: Path) -> None:
    config = load_config(tiny, ["objective={name: late_interaction}"])
    towers = build_towers(config, 300).eval()
    text = torch.tensor([[5, 6, 1, 0], [7, 1, 0, 0]]).repeat(1, 3)
    inputs = {"image": (torch.rand(2, 3, 16, 16),), "text": (text, text > 0)}
    with torch.no_grad():
        found = compared(towers, "tokens")(inputs)
        wanted = towers(inputs, None, ["image.tokens", "text.tokens"])
    assert found.keys() == {"image", "text"}
    for name, vectors in found.items():
        assert torch.equal(vectors, wanted[f"{name}.tokens"])
    with pytest.raises(GigabatchError, match="tap=tokens: the run has no tokens of image, text"):
        place_compared(load_config(tiny), ["image", "text"], "tokens")
