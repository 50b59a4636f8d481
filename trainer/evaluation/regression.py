"""A linear probe of continuous labels: ridge regression on frozen embeddings, sharded over ranks.

Minimises mean (y - w . x - b)^2 + l2 |w|^2 (the bias b is free) over standardised features, in
float64. The minimum is where a D x D system of sums over samples is solved, so one reduction of
these sums gives it exactly, for every l2 at once, where a solver that goes step by step would take
a reduction a step and end at a tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.kernels import gather_rows
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.probe import HELD_OUT, L2, Standard, held_out
from gigabatch.trainer.evaluation.score_rows import blocks

GRID = (1e3, 1e2, 1e1, *L2)
PREDICTED, TRUE = "predicted", "true"
"""The figures of a sample."""


@dataclass(frozen=True)
class Ridge:
    """`weight` float64 [D], of standardised features, and `bias`, float64 []."""

    standard: Standard
    weight: Tensor
    bias: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """float64 [n]."""
        parts = [self.standard(x[part]) @ self.weight for part in blocks(len(x), x.shape[1])]
        return torch.cat([*parts, self.bias.new_zeros(0)]) + self.bias


def fit_ridge(x: Tensor, y: Tensor, grid: Sequence[float], world: World) -> list[Ridge]:
    """For each l2 of `grid` that of all ranks' rows: `x` [n, D], `y` float64 [n]. Called on every
    rank alike. Raises GigabatchError for features that are not finite, and where there are none."""
    bad = world.sum(torch.tensor(float((~x.isfinite()).any()), device=x.device))
    if bad:
        raise GigabatchError("a probe needs finite features; some are NaN or infinite.")
    count, total = world.sum(torch.stack([y.new_tensor(float(len(y))), y.sum()]))
    if not count:
        raise GigabatchError("a probe needs samples to be fitted on; there are none.")
    standard, mean = Standard.of(x, world), total / count
    width = x.shape[1]
    sums = torch.zeros(width, width + 1, dtype=torch.float64, device=x.device)
    for part in blocks(len(x), width):
        rows = standard(x[part])
        sums += rows.T @ torch.cat([rows, (y[part] - mean).unsqueeze(1)], 1)
    sums = world.sum(sums) / count
    values, axes = torch.linalg.eigh(sums[:, :-1])
    along = axes.T @ sums[:, -1]
    return [Ridge(standard, axes @ (along / (values.clamp(min=0) + l2)), mean) for l2 in grid]


def choose_l2(x: Tensor, y: Tensor, world: World, seed: int, grid: Sequence[float] = GRID) -> float:
    """Of `grid`, what has the least squared error on the held-out fifth; of ones that are equal
    but for rounding the largest."""
    held = held_out(len(x), world, seed, HELD_OUT).to(x.device)
    falling = sorted(grid, reverse=True)
    probes = fit_ridge(x[~held], y[~held], falling, world)
    missed = torch.stack([(probe.predict(x[held]) - y[held]).square().sum() for probe in probes])
    best, chosen = float("inf"), falling[0]
    for l2, error in zip(falling, world.sum(missed).tolist(), strict=True):
        if error < best * (1 - 1e-9):
            best, chosen = error, l2
    return chosen


def regression_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], world: World, seed: int
) -> tuple[dict[str, Tensor], float]:
    """(`predicted` and `true` of every test sample, float64 [N], on every rank; the l2 chosen).

    `train`, `test`: this rank's features [n, D] and float64 labels [n].
    """
    (x, y), (test_x, test_y) = train, test
    l2 = choose_l2(x, y, world, seed)
    (probe,) = fit_ridge(x, y, [l2], world)
    figures = {PREDICTED: probe.predict(test_x), TRUE: test_y}
    return {name: gather_rows(values, world.group) for name, values in figures.items()}, l2


def regression_summary(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """`mae`, `rmse`, and `r2`, 1 - sum of squared errors / sum of squares about the mean of these
    samples; where their labels are all one, 1 if all are met, else 0 (as scikit-learn has it)."""
    true = figures[TRUE]
    error = figures[PREDICTED] - true
    lost, spread = float(error.square().sum()), float((true - true.mean()).square().sum())
    r2 = 1 - lost / spread if spread else float(not lost)
    return {
        "mae": float(error.abs().mean()), "rmse": float(error.square().mean().sqrt()), "r2": r2,
    }  # fmt: skip
