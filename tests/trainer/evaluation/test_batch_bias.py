from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from gigabatch.trainer.evaluation.batch_bias import Pairs, batch_bias, order_of_round

TAU = 0.1
SEED = 3


def case(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    text = random.normal(size=(count, width))
    image = text + 0.3 * random.normal(size=(count, width))
    return unit(image), unit(text)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def pairs(q: np.ndarray, k: np.ndarray, ids: np.ndarray | None = None) -> Pairs:
    each = np.arange(len(q)) if ids is None else ids
    return Pairs(torch.from_numpy(q).float(), torch.from_numpy(k).float(), torch.from_numpy(each))


def estimates(q: np.ndarray, k: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(exp(h / tau) [2, n, n], of no pair that shares an id; its mean over negatives [2, n])."""
    scores = q @ k.T
    own = np.diag(scores)[:, None]
    wrong = ids[:, None] != ids[None]
    each = np.stack([np.exp((s - own) / TAU) * wrong for s in (scores, scores.T)])
    return each, each.sum(2) / wrong.sum(1)


def gradient(
    q: np.ndarray, k: np.ndarray, ids: np.ndarray, u: np.ndarray | None = None
) -> np.ndarray:
    """[2, n, D] of mean_i tau g_i / u_i, both ways, u fixed (u = g: of tau log g), by both sides,
    along the sphere."""
    each, mean = estimates(q, k, ids)
    negatives = (ids[:, None] != ids[None]).sum(1)
    weight = each / ((mean if u is None else u)[:, :, None] * negatives[:, None] * len(q))
    for side in weight:
        side[np.diag_indices(len(q))] = -side.sum(1)
    by_score = weight[0] + weight[1].T
    found = np.stack([by_score @ k, by_score.T @ q])
    sides = np.stack([q, k])
    return found - (found * sides).sum(2, keepdims=True) * sides


def test_it_is_what_dense_batches_say() -> None:
    """The same batches, in numpy: running estimates, both halves, and what is made of them."""
    (q, k), ids = case(12, 5), np.arange(12) // 2 * (np.arange(12) < 6) + np.arange(12)
    rounds, gamma, settling = 5, 0.6, 3  # 0.4^(2 t) <= 0.01 from t = 3 on
    whole, known = gradient(q, k, ids), estimates(q, k, ids)[1]
    u, halves = known.copy(), np.zeros((2, 2, 2, 12, 5))
    for number in range(-settling, rounds):
        for rows in order_of_round(12, SEED, number).view(-1, 4).numpy():
            mine = q[rows], k[rows], ids[rows]
            u[:, rows] = (1 - gamma) * u[:, rows] + gamma * estimates(*mine)[1]
            if number >= 0:
                for kind, each in enumerate((u, known)):
                    found = gradient(*mine, each[:, rows]) * 4 / 12 / (2 if number < 2 else 3)
                    halves[kind, int(number >= 2)][:, rows] += found
    found, steady = halves
    apart, beside = found[0] - found[1], steady[0] - steady[1]
    one, two = found - (apart * beside).sum() / (beside * beside).sum() * (steady - whole)
    size = np.linalg.norm(whole)
    error = np.sqrt(((one - whole) * (two - whole)).sum()) / size
    cosine = ((one + two) / 2 * whole).sum() / (size * np.sqrt((one * two).sum()))
    noise = np.linalg.norm(one - two) / 2 / size
    assert error > 0.05
    assert cosine < 1
    told = batch_bias(pairs(q, k, ids), 4, TAU, gamma, rounds, SEED)
    assert told["relative_error"] == pytest.approx(error, rel=1e-4)
    assert told["relative_noise"] == pytest.approx(noise, rel=1e-4)
    assert told["cosine"] == pytest.approx(cosine, rel=1e-4)


@pytest.mark.slow
def test_the_error_is_that_of_the_expectation_over_all_batches() -> None:
    """No noise of the rounds is left in it: against every batch there is."""
    (q, k), ids = case(8, 3), np.arange(8)
    mean = np.zeros((2, 8, 3))
    for rows in map(list, combinations(range(8), 4)):
        mean[:, rows] += gradient(q[rows], k[rows], ids[rows]) * 4 / 8
    mean /= 35  # of the 70 batches each pair is in half
    whole = gradient(q, k, ids)
    error = np.linalg.norm(mean - whole) / np.linalg.norm(whole)
    cosine = (mean * whole).sum() / np.linalg.norm(mean) / np.linalg.norm(whole)
    told = batch_bias(pairs(q, k), 4, TAU, 1.0, 60, seed=0)
    assert told["relative_error"] == pytest.approx(error, rel=0.1)
    assert told["cosine"] == pytest.approx(cosine, abs=0.01)
    few = batch_bias(pairs(q, k), 4, TAU, 1.0, 10, seed=0)
    assert few["relative_noise"] > 1.5 * told["relative_noise"] > 0


@pytest.mark.slow
def test_larger_batches_and_slower_estimates_are_less_biased() -> None:
    given = pairs(*case(64, 16))
    small, large, slow = (
        batch_bias(given, batch, TAU, gamma, 10, seed=1)["relative_error"]
        for batch, gamma in ((4, 1.0), (16, 1.0), (4, 0.1))
    )
    assert small > 1.5 * large
    assert small > 1.5 * slow


def test_a_batch_of_everything_has_no_bias() -> None:
    told = batch_bias(pairs(*case(16, 4)), 16, TAU, 1.0, 2, seed=0)
    assert told["relative_error"] < 1e-5
    assert told["relative_noise"] < 1e-5
    assert told["cosine"] == pytest.approx(1)
