"""Linear probe of continuous labels: ridge regression on frozen embeddings.

Minimizes mean (y - w . x - b)^2 + l2 |w|^2 over standardized features in float64, with an
unpenalized bias b. The normal equations are D x D sums over samples, so one reduction over ranks
gives the exact minimum for every l2 at once. An iterative solver would need a reduction per step,
and its result would depend on a tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.kernels import gather_rows
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.linear_fit import (
    L2_GRID,
    Standardization,
    fit_with_chosen_l2,
    require_finite,
)
from gigabatch.trainer.evaluation.metrics.score_rows import blocks

RIDGE_L2_GRID = (1e3, 1e2, 1e1, *L2_GRID)
PREDICTED, TRUE = "predicted", "true"
"""Keys of the predicted and true labels."""


@dataclass(frozen=True)
class Ridge:
    """A linear model of standardized features.

    Attributes:
        standardize: Standardization of the features.
        weight: float64 [D].
        bias: float64 [].
    """

    standardize: Standardization
    weight: Tensor
    bias: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Return predictions float64 [n]."""
        parts = [self.standardize(x[part]) @ self.weight for part in blocks(len(x), x.shape[1])]
        return torch.cat([*parts, self.bias.new_zeros(0)]) + self.bias


def fit_ridge(x: Tensor, y: Tensor, penalties: Sequence[float], world: World) -> list[Ridge]:
    """Fit one model per penalty to all ranks' rows.

    Args:
        x: This rank's features [n, D].
        y: This rank's labels, float64 [n].
        penalties: Values of l2.
        world: The ranks; every rank must call this function.

    Raises:
        GigabatchError: if a feature is not finite, or there are no rows.
    """
    require_finite(x, world)
    count, total = world.sum(torch.stack([y.new_tensor(float(len(y))), y.sum()]))
    if not count:
        raise GigabatchError("a linear probe needs training samples; there are none.")
    standardize, mean = Standardization.fit(x, world), total / count
    width = x.shape[1]
    # Standardized features have mean zero, so the best bias is the mean label for every l2.
    sums = torch.zeros(width, width + 1, dtype=torch.float64, device=x.device)
    for part in blocks(len(x), width):
        rows = standardize(x[part])
        sums += rows.T @ torch.cat([rows, (y[part] - mean).unsqueeze(1)], 1)
    sums = world.sum(sums) / count
    values, axes = torch.linalg.eigh(sums[:, :-1])
    along = axes.T @ sums[:, -1]
    return [
        Ridge(standardize, axes @ (along / (values.clamp(min=0) + l2)), mean) for l2 in penalties
    ]


def squared_error(model: Ridge, x: Tensor, y: Tensor) -> Tensor:
    """Sum the squared errors of this rank's rows; float64 []."""
    return (model.predict(x) - y).square().sum()


def regression_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], world: World, seed: int
) -> tuple[dict[str, Tensor], float]:
    """Predict the labels of test samples by a linear model of the training samples.

    Args:
        train: This rank's features [n, D] and labels float64 [n].
        test: This rank's features and labels.
        world: The ranks; every rank must call this function.
        seed: Seed of the held-out choice of l2.

    Returns:
        (`predicted` and `true` of every test sample, float64 [N], on every rank; chosen l2).
    """
    (x, y), (test_x, test_y) = train, test

    def fit(x: Tensor, y: Tensor, penalties: Sequence[float]) -> list[Ridge]:
        return fit_ridge(x, y, penalties, world)

    model, l2 = fit_with_chosen_l2(x, y, world, seed, RIDGE_L2_GRID, fit, squared_error)
    values = {PREDICTED: model.predict(test_x), TRUE: test_y}
    return {name: gather_rows(rows, world.group) for name, rows in values.items()}, l2


def summarize_regression(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute `mae`, `rmse` and `r2` from `predicted` and `true`, float64 [N].

    `r2` is 1 - sum of squared errors / sum of squares about the mean of these samples. If all
    labels are equal, it is 1 if all predictions are exact, else 0, as in scikit-learn.
    """
    true = values[TRUE]
    error = values[PREDICTED] - true
    error_sum, total_sum = float(error.square().sum()), float((true - true.mean()).square().sum())
    r2 = 1 - error_sum / total_sum if total_sum else float(not error_sum)
    return {
        "mae": float(error.abs().mean()), "rmse": float(error.square().mean().sqrt()), "r2": r2,
    }  # fmt: skip
