"""Linear probe of classes: multinomial logistic regression on frozen embeddings.

Minimizes mean cross-entropy + l2 / 2 |W|^2 over standardized features, by Newton's method in
float64, with an unpenalized bias (as CLIP's evaluation, Radford et al. 2021, appendix A.3). With
l2 > 0 the minimum is unique, so the result does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.kernels import gather_rows
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.classification import LABEL, rank_classes
from gigabatch.trainer.evaluation.metrics.linear_fit import (
    L2_GRID,
    Standardization,
    fit_with_chosen_l2,
    require_finite,
)
from gigabatch.trainer.evaluation.metrics.newton import Problem, minimize
from gigabatch.trainer.evaluation.progress import tracked


@dataclass(frozen=True)
class Logistic:
    """A linear classifier of standardized features.

    Attributes:
        standardize: Standardization of the features.
        weight: float64 [C, D].
        bias: float64 [C].
    """

    standardize: Standardization
    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Return float64 [n, C]."""
        return self.standardize(x) @ self.weight.T + self.bias


def fit_logistic(
    x: Tensor, y: Tensor, penalties: Sequence[float], classes: int, world: World
) -> list[Logistic]:
    """Fit one classifier per penalty to all ranks' rows; each fit starts from the previous one.

    Args:
        x: This rank's features [n, D].
        y: This rank's classes, int64 [n], below `classes`.
        penalties: Values of l2, above 0.
        classes: Number of classes C.
        world: The ranks; every rank must call this function.

    Raises:
        GigabatchError: if a feature is not finite.
    """
    require_finite(x, world)
    standardize = Standardization.fit(x, world)
    total = world.sum(torch.tensor(float(len(x)), dtype=torch.float64, device=x.device))
    problem = Problem(
        lambda part: standardize(x[part]), y, classes, x.shape[1], float(total), world
    )
    start, models = problem.zeros(), []
    for l2 in tracked("fitting the probe", penalties, len(penalties)):
        solution = minimize(problem, start, l2)
        models.append(Logistic(standardize, solution[:, :-1].clone(), solution[:, -1].clone()))
        start = solution  # It is near the minimum of the next penalty, which saves iterations.
    return models


def count_errors(model: Logistic, x: Tensor, y: Tensor) -> Tensor:
    """Count this rank's misclassified rows; float64 []."""
    return (model.logits(x).argmax(1) != y).sum().double()


def linear_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], world: World, seed: int
) -> tuple[dict[str, Tensor], float]:
    """Classify test samples by a linear model of the training samples.

    Args:
        train: This rank's features [n, D] and labels int64 [n]; labels may have any values.
        test: This rank's features and labels. Samples of a label without training samples count as
            errors.
        world: The ranks; every rank must call this function.
        seed: Seed of the held-out choice of l2.

    Returns:
        (`top1`, `top5` and `label` of every test sample, float64 [N], on every rank; chosen l2).
    """
    (x, y), (test_x, test_y) = train, test
    known = sorted({label for rank in world.gather(y.unique().tolist()) for label in rank})
    labels = torch.tensor(known, device=y.device)

    def fit(x: Tensor, y: Tensor, penalties: Sequence[float]) -> list[Logistic]:
        return fit_logistic(x, y, penalties, len(known), world)

    model, l2 = fit_with_chosen_l2(
        x, torch.searchsorted(labels, y), world, seed, L2_GRID, fit, count_errors
    )
    test_classes = torch.searchsorted(labels, test_y).clamp(max=len(known) - 1)
    is_known = labels[test_classes] == test_y

    def score(part: slice) -> Tensor:
        logits = model.logits(test_x[part]).float()
        logits[~is_known[part], test_classes[part][~is_known[part]]] = -torch.inf
        return logits

    values = rank_classes(score, test_classes, len(known), world)
    return values | {LABEL: gather_rows(test_y, world.group)}, l2
