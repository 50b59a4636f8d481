"""Geometry of embeddings: uniformity, alignment, tolerance, isotropy, rank, modality gap.

Every function takes this rank's rows and must be called on every rank. Sums are float64. Only
uniformity compares pairs; the others need one reduction over ranks. Rows are normalized first,
except for `effective_rank` and the classifier of `domain_auc`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.kernels import gather_rows
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.linear_fit import held_out
from gigabatch.trainer.evaluation.metrics.linear_probe import fit_logistic
from gigabatch.trainer.evaluation.metrics.score_rows import dot_rows, tracked_blocks
from gigabatch.trainer.evaluation.metrics.statistics import auc

DOMAIN_L2 = 1e-3


def uniformity(z: Tensor, world: World) -> float:
    """Compute log of the mean over pairs i != j of exp(-2 |z_i - z_j|^2) (Wang and Isola 2020).

    It is 0 if all rows are equal, and falls as they cover the sphere more evenly. Time O(N^2 D).

    Raises:
        GigabatchError: if there are fewer than two rows.
    """
    z = _unit(z).float()
    first, keys = sum(world.gather(len(z))[: world.rank]), gather_rows(z, world.group)
    score, total = dot_rows(z, keys), z.new_zeros((), dtype=torch.float64)
    for part in tracked_blocks("measuring uniformity", len(z), len(keys)):
        terms = (4 * (score(part).double() - 1)).exp()  # |z_i - z_j|^2 = 2 - 2 cosine
        diagonal = torch.arange(first + part.start, first + part.stop, device=z.device)
        total += terms.sum() - terms.gather(1, diagonal.unsqueeze(1)).sum()
    return float((world.sum(total) / _pairs(len(keys), "uniformity")).log())


def alignment(x: Tensor, y: Tensor, world: World) -> float:
    """Compute the mean of |x_i - y_i|^2 over positive pairs (Wang and Isola 2020)."""
    return _mean((_unit(x) - _unit(y)).square().sum(1), world)


def tolerance(z: Tensor, labels: Tensor, world: World) -> float:
    """Compute the mean cosine over pairs i != j of one class (Wang and Liu 2021).

    Args:
        z: [n, D].
        labels: int64 [n].
        world: The ranks.

    Raises:
        GigabatchError: if no class has two samples.
    """
    z = _unit(z)
    known = torch.tensor(
        sorted({c for rank in world.gather(labels.unique().tolist()) for c in rank}),
        device=labels.device, dtype=labels.dtype,
    )  # fmt: skip
    classes = torch.searchsorted(known, labels)
    sums = z.new_zeros(len(known), z.shape[1]).index_add(0, classes, z)
    squares = z.new_zeros(len(known)).index_add(0, classes, z.square().sum(1))
    counts = torch.bincount(classes, minlength=len(known)).double()
    sums, squares, counts = world.sum(sums), world.sum(squares), world.sum(counts)
    pairs = float((counts * (counts - 1)).sum())
    if not pairs:
        raise GigabatchError(
            "tolerance needs a class with two samples or more; every class has one. Set a "
            "different label=, or leave it out."
        )
    # The sum over ordered pairs is the squared norm of the sum minus the pairs i = j.
    return float((sums.square().sum() - squares.sum()) / pairs)


def isotropy(z: Tensor, world: World) -> float:
    """Compute 1 - the mean cosine over pairs i != j (Su and Xu 2022).

    It is 1 if directions cancel, and 0 if all rows are equal.

    Raises:
        GigabatchError: if there are fewer than two rows.
    """
    z = _unit(z)
    total, squares = world.sum(z.sum(0)), world.sum(z.square().sum())
    count = int(world.sum(torch.tensor(len(z), device=z.device)))
    return float(1 - (total.square().sum() - squares) / _pairs(count, "isotropy"))


def effective_rank(z: Tensor, world: World) -> float:
    """Compute exp of the entropy of the singular values divided by their sum.

    Rows are neither normalized nor centered (Roy and Vetterli 2007; RankMe, Garrido et al. 2023).
    The result is between 1 and D. The singular values come from the D x D Gram matrix, whose
    rounding hides those below about 1e-8 of the largest.
    """
    z = z.double()
    # Rounding may leave an eigenvalue of 0 slightly negative.
    values = torch.linalg.eigvalsh(world.sum(z.T @ z)).clamp(min=0).sqrt()
    share = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def modality_gap(x: Tensor, y: Tensor, world: World) -> float:
    """Compute |mean x - mean y| of unit vectors (Liang et al. 2022), at most 2."""
    return float((_center(x, world) - _center(y, world)).norm())


def domain_auc(x: Tensor, y: Tensor, world: World, seed: int) -> float:
    """Compute the AUC with which a linear classifier separates x from y (CLOSE).

    The classifier is fitted on a seeded half of each side, and the AUC of its score is measured on
    the other half. 0.5 means no separation, and 1 means complete separation.
    """
    rows = torch.cat([x, y])
    side = torch.cat([torch.zeros(len(x)), torch.ones(len(y))]).long().to(x.device)
    # The choice depends on the position within a side, so the halves do not depend on the ranks.
    test = torch.cat([held_out(len(part), world, seed, 0.5) for part in (x, y)]).to(x.device)
    (classifier,) = fit_logistic(rows[~test], side[~test], [DOMAIN_L2], 2, world)
    logits = classifier.logits(rows[test])
    score = gather_rows((logits[:, 1] - logits[:, 0]).float(), world.group)
    return auc(score, gather_rows(side[test], world.group) == 1)


def geometry_metrics(
    outputs: Mapping[str, Tensor], labels: Tensor | None, world: World, seed: int
) -> dict[str, float]:
    """Compute all metrics of this module.

    Args:
        outputs: Modality -> this rank's rows [n, D]; row i of each belongs to one sample.
        labels: int64 [n] for tolerance, or None.
        world: The ranks.
        seed: Seed of the split of `domain_auc`.

    Returns:
        For each modality A, `A_uniformity`, `A_isotropy` and `A_effective_rank`, and with labels
        `A_tolerance`. For two modalities of equal width, `alignment`, `modality_gap` and
        `domain_auc`; for three or more, the same for every pair, as `A_B_alignment` and so on.
    """
    metrics: dict[str, float] = {}
    for name, z in outputs.items():
        metrics[f"{name}_uniformity"] = uniformity(z, world)
        metrics[f"{name}_isotropy"] = isotropy(z, world)
        metrics[f"{name}_effective_rank"] = effective_rank(z, world)
        if labels is not None:
            metrics[f"{name}_tolerance"] = tolerance(z, labels, world)
    for (first, x), (second, y) in combinations(outputs.items(), 2):
        if x.shape[1] == y.shape[1]:
            prefix = "" if len(outputs) == 2 else f"{first}_{second}_"
            metrics[f"{prefix}alignment"] = alignment(x, y, world)
            metrics[f"{prefix}modality_gap"] = modality_gap(x, y, world)
            metrics[f"{prefix}domain_auc"] = domain_auc(x, y, world, seed)
    return metrics


def _unit(z: Tensor) -> Tensor:
    return F.normalize(z.double(), dim=-1)


def _center(z: Tensor, world: World) -> Tensor:
    count = world.sum(torch.tensor(float(len(z)), dtype=torch.float64, device=z.device))
    return world.sum(_unit(z).sum(0)) / count


def _mean(values: Tensor, world: World) -> float:
    count = world.sum(torch.tensor(float(len(values)), dtype=torch.float64, device=values.device))
    return float(world.sum(values.sum()) / count)


def _pairs(count: int, metric: str) -> int:
    if count < 2:
        raise GigabatchError(f"{metric} needs at least two samples; there is {count}.")
    return count * (count - 1)
