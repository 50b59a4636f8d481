"""Batch bias: difference between the mean gradient of small batches and that of all pairs.

The gradients are with respect to fixed embeddings (SogCLR, Yuan et al. 2022; iSogCLR). The loss of
N pairs is that of the objective `sogclr` with all pairs in one batch, summed over both directions,

    mean_i tau log mean_{j != i} exp((s_ij - s_ii) / tau).

A batch of B contains B - 1 negatives of a sample. The logarithm of their mean is on average below
that of the mean of all negatives, and its gradient overweights the negatives in the batch. This
bias grows with a smaller B and a lower tau. Unlike noise, it does not average out over batches. A
running estimate u in place of the batch's mean reduces the bias; a smaller gamma reduces it more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.data.rng import key, permute
from gigabatch.trainer.evaluation.progress import tracked
from gigabatch.trainer.objectives import Context, Loss, Objective, build_objective, parse_settings

MISSING_VARIANCE = 0.01
"""Share of u's stationary variance that is still missing when averaging begins."""
FROZEN_GAMMA = 1e-9
"""A gamma so small that u does not move."""
CONTEXT = Context(None, 1)


@dataclass(frozen=True)
class Pairs:
    """Pairs of embeddings.

    Attributes:
        q: float32 [N, D].
        k: float32 [N, D]. Row i and row i of `q` are a pair.
        ids: int64 [N]. Pairs with equal ids are not negatives of each other.
    """

    q: Tensor
    k: Tensor
    ids: Tensor

    def take(self, rows: Tensor) -> Pairs:
        """Return some of the pairs."""
        return Pairs(self.q[rows], self.k[rows], self.ids[rows])


def batch_bias(
    pairs: Pairs, batch: int, temperature: float, gamma: float, rounds: int, seed: int
) -> dict[str, float]:
    """Compare the mean gradient G of batches with the gradient F of all pairs.

    Both are [2, N, D], with respect to the embeddings and tangent to the sphere, because the
    component along a unit vector never reaches a tower.

    Two techniques remove sampling noise from the error. First, the noise of the two halves of the
    rounds is independent, so products of one half with the other are free of noise on average.
    Second, H is the gradient of the same batches with u fixed at its value for all pairs. It has
    expectation F and shares most of G's noise, so G - c (H - F), with c by least squares, has less
    noise (a control variate).

    Args:
        pairs: N pairs.
        batch: Pairs per batch; N must be a multiple of it.
        temperature: tau.
        gamma: Share of the batch's estimate in u; 1 gives the loss of each batch without u.
        rounds: Passes over all pairs, at least 2, each in a new order. Time O(rounds N batch D).
        seed: Seed of the orders.

    Returns:
        `relative_error`: |mean(G) - F| / |F|, with the expectation of G as mean(G).
        `relative_noise`: |G - mean(G)| / |F|, the noise that remains after the rounds; it is
        excluded from the error. `cosine`: cosine of mean(G) and F.
    """
    unit = Pairs(F.normalize(pairs.q, dim=-1), F.normalize(pairs.k, dim=-1), pairs.ids)
    full, full_state = _gradient(_objective(temperature, 1.0), unit, _initial_state(unit))
    means, controls = _half_means(unit, full_state, batch, temperature, gamma, rounds, seed)
    noise, control_noise = means[0] - means[1], controls[0] - controls[1]
    covariance = float((noise * control_noise).sum())
    coefficient = covariance / max(float(control_noise.square().sum()), 1e-300)
    first, second = means - coefficient * (controls - full)
    size, length = float(full.norm()), math.sqrt(max(0.0, float((first * second).sum())))
    along = float(((first + second) / 2 * full).sum())
    squared_error = float(((first - full) * (second - full)).sum())
    return {
        "relative_error": math.sqrt(max(0.0, squared_error)) / size,
        "relative_noise": float((first - second).norm()) / 2 / size,
        "cosine": min(1.0, along / (length * size)) if length else 0.0,
    }


def _half_means(
    pairs: Pairs, full_state: Tensor, batch: int, temperature: float, gamma: float, rounds: int,
    seed: int,
) -> Tensor:  # fmt: skip
    """Average gradients over the first and the second half of the rounds.

    Returns float64 [2, 2, 2, N, D]: the gradients, then those with u fixed; each by half and side.
    `full_state` is the table after one batch of all pairs, so u starts at its mean. Warm-up rounds
    without gradients come first, until the variance of u is stationary.
    """
    running, fixed = _objective(temperature, gamma), _objective(temperature, FROZEN_GAMMA)
    state = full_state.clone()
    halves = pairs.q.new_zeros(2, 2, 2, *pairs.q.shape, dtype=torch.float64)
    first_half = rounds // 2
    numbers = range(-_warmup_rounds(gamma), rounds)
    for number in tracked("measuring rounds of batches", numbers, len(numbers)):
        order = order_of_round(len(pairs.q), seed, number).to(pairs.q.device)
        half = halves[:, int(number >= first_half)]
        for rows in order.view(-1, batch):
            chosen = pairs.take(rows)
            if number < 0:
                state[rows] = _updated_state(running, chosen, state[rows])
                continue
            gradient, state[rows] = _gradient(running, chosen, state[rows])
            half[0][:, rows] += gradient
            half[1][:, rows] += _gradient(fixed, chosen, full_state[rows])[0]
    # The loss of a batch is a mean over its pairs, so its gradient is N / batch times too large.
    share = batch / len(pairs.q)
    counts = halves.new_tensor([first_half, rounds - first_half]).view(2, 1, 1, 1)
    return halves * share / counts


def _objective(temperature: float, gamma: float) -> Objective[Any]:
    """Build `sogclr` with a fixed temperature."""
    settings = {
        "name": "sogclr", "taps": ("image", "text"), "positives": "id", "gamma": gamma,
        "temperature": temperature, "temperature_min": temperature, "temperature_max": temperature,
    }  # fmt: skip
    return build_objective(parse_settings(settings))


def _initial_state(pairs: Pairs) -> Tensor:
    """Return the table rows of samples that have not been seen yet."""
    row = _objective(1.0, 1.0).needs.tables["state"]
    return torch.tensor(row, device=pairs.q.device).repeat(len(pairs.q), 1)


def _gradient(objective: Objective[Any], pairs: Pairs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return (gradients float64 [2, n, D] of both sides, the new table rows)."""
    sides = [side.clone().requires_grad_() for side in (pairs.q, pairs.k)]
    with torch.enable_grad():
        outputs = dict(zip(("image", "text"), sides, strict=True))
        loss: Loss = objective(outputs, _meta(pairs, state), CONTEXT)
        loss.value.backward()
    return torch.stack([_tangent(side) for side in sides]), loss.updates()["state"]


@torch.no_grad()
def _updated_state(objective: Objective[Any], pairs: Pairs, state: Tensor) -> Tensor:
    """Return the new table rows."""
    outputs = {"image": pairs.q, "text": pairs.k}
    loss: Loss = objective(outputs, _meta(pairs, state), CONTEXT)
    return loss.updates()["state"]


def _meta(pairs: Pairs, state: Tensor) -> dict[str, Tensor]:
    return {"sample": pairs.ids, "id": pairs.ids, "state": state}


def _tangent(side: Tensor) -> Tensor:
    """Return the gradient of unit vectors without its component along them, float64 [n, D]."""
    assert side.grad is not None
    z, grad = side.detach().double(), side.grad.double()
    return grad - (grad * z).sum(1, keepdim=True) * z


def _warmup_rounds(gamma: float) -> int:
    """Return the number of rounds t after which (1 - gamma)^(2 t) is `MISSING_VARIANCE`."""
    return math.ceil(math.log(MISSING_VARIANCE) / math.log(1 - gamma) / 2) if gamma < 1 else 0


def order_of_round(size: int, seed: int, number: int) -> Tensor:
    """Return the order of pairs in a round, int64 [size]; warm-up rounds are negative."""
    rng_key = key(seed, "batch bias", number)
    return torch.from_numpy(permute(np.arange(size), size, rng_key))


def choose_pairs(samples: int, total: int, seed: int) -> Tensor:
    """Choose `samples` of `total` pairs by seeded random numbers; return int64 [samples]."""
    return torch.from_numpy(permute(np.arange(samples), total, key(seed, "batch bias")))
