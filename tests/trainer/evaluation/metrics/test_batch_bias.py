from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from gigabatch.trainer.evaluation.metrics.batch_bias import Pairs, batch_bias, order_of_round

TAU = 0.1
SEED = 3


def case(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors of images and texts, [count, width] each, similar in pairs."""
    random = np.random.default_rng(2)
    text = random.normal(size=(count, width))
    image = text + 0.3 * random.normal(size=(count, width))
    return unit(image), unit(text)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def pairs(q: np.ndarray, k: np.ndarray, ids: np.ndarray | None = None) -> Pairs:
    ids = np.arange(len(q)) if ids is None else ids
    return Pairs(torch.from_numpy(q).float(), torch.from_numpy(k).float(), torch.from_numpy(ids))


def estimates(q: np.ndarray, k: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return exp(h / tau) [2, n, n], 0 for pairs that share an id, and its means [2, n]."""
    scores = q @ k.T
    positive = np.diag(scores)[:, None]
    is_negative = ids[:, None] != ids[None]
    terms = np.stack([np.exp((s - positive) / TAU) * is_negative for s in (scores, scores.T)])
    return terms, terms.sum(2) / is_negative.sum(1)


def gradient(
    q: np.ndarray, k: np.ndarray, ids: np.ndarray, u: np.ndarray | None = None
) -> np.ndarray:
    """Return the gradient [2, n, D] of mean_i tau g_i / u_i, both ways, tangent to the sphere.

    u is constant; by default it equals g, which gives the gradient of tau log g.
    """
    terms, mean = estimates(q, k, ids)
    negatives = (ids[:, None] != ids[None]).sum(1)
    weight = terms / ((mean if u is None else u)[:, :, None] * negatives[:, None] * len(q))
    for side in weight:
        side[np.diag_indices(len(q))] = -side.sum(1)
    by_score = weight[0] + weight[1].T
    grad = np.stack([by_score @ k, by_score.T @ q])
    sides = np.stack([q, k])
    return grad - (grad * sides).sum(2, keepdims=True) * sides


def test_batch_bias_matches_dense_numpy() -> None:
    """Repeat the same batches in numpy, with running estimates, halves and the control variate."""
    (q, k), ids = case(12, 5), np.arange(12) // 2 * (np.arange(12) < 6) + np.arange(12)
    rounds, gamma, warmup = 5, 0.6, 3  # 0.4^(2 t) <= 0.01 from t = 3 on
    full, full_u = gradient(q, k, ids), estimates(q, k, ids)[1]
    u, halves = full_u.copy(), np.zeros((2, 2, 2, 12, 5))
    for number in range(-warmup, rounds):
        for rows in order_of_round(12, SEED, number).view(-1, 4).numpy():
            batch = q[rows], k[rows], ids[rows]
            u[:, rows] = (1 - gamma) * u[:, rows] + gamma * estimates(*batch)[1]
            if number >= 0:
                for kind, estimate in enumerate((u, full_u)):
                    grad = gradient(*batch, estimate[:, rows])
                    mean = grad * 4 / 12 / (2 if number < 2 else 3)
                    halves[kind, int(number >= 2)][:, rows] += mean
    means, controls = halves
    noise, control_noise = means[0] - means[1], controls[0] - controls[1]
    coefficient = (noise * control_noise).sum() / (control_noise * control_noise).sum()
    first, second = means - coefficient * (controls - full)
    size = np.linalg.norm(full)
    error = np.sqrt(((first - full) * (second - full)).sum()) / size
    cosine = ((first + second) / 2 * full).sum() / (size * np.sqrt((first * second).sum()))
    assert error > 0.05
    assert cosine < 1
    metrics = batch_bias(pairs(q, k, ids), 4, TAU, gamma, rounds, SEED)
    assert metrics["relative_error"] == pytest.approx(error, rel=1e-4)
    noise_size = np.linalg.norm(first - second) / 2 / size
    assert metrics["relative_noise"] == pytest.approx(noise_size, rel=1e-4)
    assert metrics["cosine"] == pytest.approx(cosine, rel=1e-4)


@pytest.mark.slow
def test_relative_error_equals_mean_over_all_batches() -> None:
    """Enumerate all batches to avoid sampling noise."""
    (q, k), ids = case(8, 3), np.arange(8)
    mean = np.zeros((2, 8, 3))
    for rows in map(list, combinations(range(8), 4)):
        mean[:, rows] += gradient(q[rows], k[rows], ids[rows]) * 4 / 8
    mean /= 35  # each pair is in half of the 70 batches
    full = gradient(q, k, ids)
    error = np.linalg.norm(mean - full) / np.linalg.norm(full)
    cosine = (mean * full).sum() / np.linalg.norm(mean) / np.linalg.norm(full)
    many = batch_bias(pairs(q, k), 4, TAU, 1.0, 60, seed=0)
    assert many["relative_error"] == pytest.approx(error, rel=0.1)
    assert many["cosine"] == pytest.approx(cosine, abs=0.01)
    few = batch_bias(pairs(q, k), 4, TAU, 1.0, 10, seed=0)
    assert few["relative_noise"] > 1.5 * many["relative_noise"] > 0


@pytest.mark.slow
def test_larger_batch_or_smaller_gamma_reduces_error() -> None:
    sample = pairs(*case(64, 16))
    small, large, slow = (
        batch_bias(sample, batch, TAU, gamma, 10, seed=1)["relative_error"]
        for batch, gamma in ((4, 1.0), (16, 1.0), (4, 0.1))
    )
    assert small > 1.5 * large
    assert small > 1.5 * slow


def test_batch_of_all_pairs_has_no_bias() -> None:
    metrics = batch_bias(pairs(*case(16, 4)), 16, TAU, 1.0, 2, seed=0)
    assert metrics["relative_error"] < 1e-5
    assert metrics["relative_noise"] < 1e-5
    assert metrics["cosine"] == pytest.approx(1)
