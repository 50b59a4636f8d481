"""Late interaction against loops over tokens."""

from __future__ import annotations

from pathlib import Path

import dense_figures as dense
import numpy as np
import pytest
import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.configfile import load_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation import scores
from gigabatch.trainer.evaluation.embedding import Embedded
from gigabatch.trainer.evaluation.retrieval import retrieval_figures
from gigabatch.trainer.evaluation.scores import Rows, maxsim_rows, score_pairs
from gigabatch.trainer.evaluation.taps import compared, place_compared
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
