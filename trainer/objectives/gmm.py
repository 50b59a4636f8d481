"""Clean or noisy? A mixture of two Gaussians over the samples' losses (DivideMix, Li et al. 2020;
PC2, number 1), fitted over all ranks' samples without bringing them together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gigabatch.trainer.distributed import World

ROUNDS = 5000
BINS = 8192
LEAST = 1e-3
"""Least variance of a component, as a share of that of all values: none may shrink to a point."""


def fit_split(values: Tensor, world: World) -> Tensor:
    """Expectation maximisation; `values` [m], this rank's. A collective; the same on every rank.

    Works on a histogram of all ranks' values, each bin by its mean, so that it costs the same for
    any number of samples. Returns float64 [2, 3], the component of lower mean first: mean,
    variance, share. Of values that are all the same, or none, both components are one.
    """
    x = values.double()
    zero = x.new_zeros(())
    count, total, squares = world.sum(torch.stack([zero + len(x), x.sum(), x.square().sum()]))
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    if float(variance) <= 1e-12 * float(mean.square()):
        return torch.stack([mean, variance, zero + 0.5]).expand(2, 3).clone()
    place = ((x - mean) / variance.sqrt() / 16 + 0.5).clamp(0, 1 - 1e-9) * BINS
    counted = [torch.bincount(place.long(), w, BINS) for w in (torch.ones_like(x), x)]
    bins = torch.stack(counted).double()  # of no value bincount makes another dtype
    weight, sums = world.sum(bins)
    weight, x = weight[weight > 0], (sums / weight)[weight > 0]
    return _maximise(x, weight / count, mean, variance)


def _maximise(x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    spread = variance.sqrt()
    means, variances = torch.stack([mean - spread, mean + spread]), variance.expand(2)
    shares = torch.full((2,), 0.5, dtype=x.dtype)
    for _ in range(ROUNDS):
        p = _log_density(x, means, variances, shares).softmax(1) * weight.unsqueeze(1)
        before, shares = means, p.sum(0).clamp(min=1e-12)
        means = p.T @ x / shares
        variances = ((p * (x.unsqueeze(1) - means).square()).sum(0) / shares).clamp(
            min=LEAST * float(variance)
        )
        if float((means - before).abs().max()) < 1e-10 * float(spread):
            break
    order = means.argsort()
    return torch.stack([means, variances, shares], 1)[order]


def clean_probability(values: Tensor, split: Tensor) -> Tensor:
    """How likely each value is of the component of lower mean; float32 [m]. Beyond the means the
    probability is that at the mean: the wider component would else take both tails."""
    split = split.to(values.device, torch.float64)
    x = values.double().clamp(split[0, 0], split[1, 0])
    return _log_density(x, *split.unbind(1)).softmax(1)[:, 0].float()


def _log_density(x: Tensor, means: Tensor, variances: Tensor, shares: Tensor) -> Tensor:
    """[m, 2], up to a constant."""
    distance = (x.unsqueeze(1) - means).square() / variances
    return shares.log() - 0.5 * (distance + variances.log() + math.log(2 * math.pi))
