"""Linear models on frozen embeddings: standardized features, held-out split, choice of L2.

Every function with a `world` takes this rank's rows and must be called on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key, uniforms
from gigabatch.trainer.distributed import World

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
HELD_OUT_SHARE = 0.2
"""Share of the training samples that is held out to choose l2."""

Model = TypeVar("Model")
Fit = Callable[[Tensor, Tensor, Sequence[float]], Sequence[Model]]
"""Function from features [n, D], labels [n] and penalties to one model per penalty."""
Error = Callable[[Model, Tensor, Tensor], Tensor]
"""Function from a model, features and labels to this rank's summed error, float64 []."""


@dataclass(frozen=True)
class Standardization:
    """Standardization of features to zero mean and unit variance.

    Attributes:
        mean: float64 [D].
        scale: float64 [D], standard deviations; 1 for a constant feature.
    """

    mean: Tensor
    scale: Tensor

    @staticmethod
    def fit(x: Tensor, world: World) -> Standardization:
        """Compute mean and scale of all ranks' rows [n, D]."""
        count = world.sum(torch.tensor(float(len(x)), dtype=torch.float64, device=x.device))
        mean = world.sum(x.double().sum(0)) / count
        variance = world.sum((x.double() - mean).square().sum(0)) / count
        # Rounding gives a constant feature a tiny variance; division by it would add noise.
        constant = variance <= 1e-12 * mean.square().clamp(min=1e-12)
        return Standardization(mean, torch.where(constant, 1.0, variance.sqrt()))

    def __call__(self, x: Tensor) -> Tensor:
        """Return standardized features, float64 [n, D]."""
        return (x.double() - self.mean) / self.scale


def require_finite(x: Tensor, world: World) -> None:
    """Check the features of all ranks.

    Raises:
        GigabatchError: on every rank, if a feature of any rank is NaN or infinite.
    """
    bad_ranks = world.sum(torch.tensor(float((~x.isfinite()).any()), device=x.device))
    if bad_ranks:
        raise GigabatchError("a linear probe needs finite features; some are NaN or infinite.")


def held_out(rows: int, world: World, seed: int, share: float) -> Tensor:
    """Choose a share of all ranks' rows by seeded random numbers.

    The choice depends on a row's position among all ranks' rows, not on the number of ranks.

    Returns:
        bool [rows]: this rank's part of the choice.
    """
    counts = world.gather(rows)
    first = sum(counts[: world.rank])
    random = uniforms(key(seed, "held out"), sum(counts), 1)[first : first + rows, 0]
    return torch.from_numpy(random < share)


def choose_l2(
    x: Tensor,
    y: Tensor,
    world: World,
    seed: int,
    grid: Sequence[float],
    fit: Fit[Model],
    error: Error[Model],
) -> float:
    """Choose the l2 with the least error on the held-out fifth of the rows.

    Args:
        x: Features [n, D].
        y: Labels [n].
        world: The ranks.
        seed: Seed of the held-out choice.
        grid: Penalties to try. If errors are equal up to rounding, the largest penalty wins.
        fit: Fits one model per penalty; penalties are passed in falling order.
        error: Summed error of a model on this rank's rows.
    """
    held = held_out(len(x), world, seed, HELD_OUT_SHARE).to(x.device)
    penalties = sorted(grid, reverse=True)
    models = fit(x[~held], y[~held], penalties)
    errors = torch.stack([error(model, x[held], y[held]) for model in models])
    # One reduction serves all penalties. They fall, so the first of equal errors has the largest.
    least, chosen = float("inf"), penalties[0]
    for l2, total in zip(penalties, world.sum(errors).tolist(), strict=True):
        if total < least * (1 - 1e-9):
            least, chosen = total, l2
    return chosen


def fit_with_chosen_l2(
    x: Tensor,
    y: Tensor,
    world: World,
    seed: int,
    grid: Sequence[float],
    fit: Fit[Model],
    error: Error[Model],
) -> tuple[Model, float]:
    """Choose l2 with `choose_l2`, then fit all rows with it; return (model, l2)."""
    l2 = choose_l2(x, y, world, seed, grid, fit, error)
    (model,) = fit(x, y, [l2])
    return model, l2
