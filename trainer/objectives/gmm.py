"""A mixture of two Gaussians over the samples' losses, which separates clean from noisy pairs
(DivideMix, Li et al. 2020; PC2). It is fitted over all ranks' samples without gathering them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gigabatch.trainer.distributed import World

ITERATIONS = 5000
BINS = 8192
MIN_VARIANCE = 1e-3
"""Smallest variance of a component relative to the total variance; prevents a component from
collapsing to a point."""


def fit_split(values: Tensor, world: World) -> Tensor:
    """Fit the mixture by expectation maximization. Collective: every rank must call it.

    It runs on a histogram of all ranks' values, each bin represented by its mean, so that its cost
    does not grow with the number of samples.

    Args:
        values: This rank's values, floating [m].
        world: Ranks that hold the values.

    Returns:
        float64 [2, 3], the same on every rank: mean, variance and share of each component, the
        lower mean first. Both components are equal if all values are equal or there are none.
    """
    x = values.double()
    zero = x.new_zeros(())
    count, total, squares = world.sum(torch.stack([zero + len(x), x.sum(), x.square().sum()]))
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    if float(variance) <= 1e-12 * float(mean.square()):
        return torch.stack([mean, variance, zero + 0.5]).expand(2, 3).clone()
    position = ((x - mean) / variance.sqrt() / 16 + 0.5).clamp(0, 1 - 1e-9) * BINS
    histograms = [torch.bincount(position.long(), w, BINS) for w in (torch.ones_like(x), x)]
    bins = torch.stack(histograms).double()  # without values, bincount returns a different dtype
    weight, sums = world.sum(bins)
    weight, x = weight[weight > 0], (sums / weight)[weight > 0]
    return _maximize(x, weight / count, mean, variance)


def _maximize(x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the components [2, 3] of weighted points; they start one deviation from the mean."""
    deviation = variance.sqrt()
    means, variances = torch.stack([mean - deviation, mean + deviation]), variance.expand(2)
    shares = torch.full((2,), 0.5, dtype=x.dtype)
    for _ in range(ITERATIONS):
        p = _log_density(x, means, variances, shares).softmax(1) * weight.unsqueeze(1)
        before, shares = means, p.sum(0).clamp(min=1e-12)
        means = p.T @ x / shares
        variances = ((p * (x.unsqueeze(1) - means).square()).sum(0) / shares).clamp(
            min=MIN_VARIANCE * float(variance)
        )
        if float((means - before).abs().max()) < 1e-10 * float(deviation):
            break
    order = means.argsort()
    return torch.stack([means, variances, shares], 1)[order]


def clean_probability(values: Tensor, split: Tensor) -> Tensor:
    """Return float32 [m]: the probability that each value belongs to the component of lower mean.

    Values outside the two means are clamped to them; otherwise the wider component would take both
    tails.
    """
    split = split.to(values.device, torch.float64)
    x = values.double().clamp(split[0, 0], split[1, 0])
    return _log_density(x, *split.unbind(1)).softmax(1)[:, 0].float()


def _log_density(x: Tensor, means: Tensor, variances: Tensor, shares: Tensor) -> Tensor:
    """Return [m, 2]: the log of each component's share times its density."""
    distance = (x.unsqueeze(1) - means).square() / variances
    return shares.log() - 0.5 * (distance + variances.log() + math.log(2 * math.pi))
