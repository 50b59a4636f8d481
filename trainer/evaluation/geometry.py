"""The shape of an embedding: uniformity, alignment, tolerance, isotropy, effective rank, and the
gap between modalities. Sums over ranks of rows, in float64; only uniformity looks at pairs.

All but `effective_rank` and the gap's classifier are of unit vectors: rows are normalised first.
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
from gigabatch.trainer.evaluation.probe import fit_probe, held_out
from gigabatch.trainer.evaluation.score_rows import blocks, dot_rows
from gigabatch.trainer.evaluation.statistics import auc

GAP_L2 = 1e-3


def uniformity(z: Tensor, world: World) -> float:
    """log of the mean over pairs i != j of exp(-2 |z_i - z_j|^2) (Wang and Isola 2020): 0 where
    all rows are one, and lower the more evenly they cover the sphere. Time O(N^2 D)."""
    z = _unit(z).float()
    first, keys = sum(world.gather(len(z))[: world.rank]), gather_rows(z, world.group)
    score, total = dot_rows(z, keys), z.new_zeros((), dtype=torch.float64)
    for part in blocks(len(z), len(keys)):
        near = (4 * (score(part).double() - 1)).exp()  # |z_i - z_j|^2 = 2 - 2 cosine
        own = torch.arange(first + part.start, first + part.stop, device=z.device)
        total += near.sum() - near.gather(1, own.unsqueeze(1)).sum()
    return float((world.sum(total) / _pairs(len(keys), "uniformity")).log())


def alignment(x: Tensor, y: Tensor, world: World) -> float:
    """The mean of |x_i - y_i|^2 over positive pairs (Wang and Isola 2020)."""
    return _mean((_unit(x) - _unit(y)).square().sum(1), world)


def tolerance(z: Tensor, labels: Tensor, world: World) -> float:
    """The mean cosine over pairs i != j of one class (Wang and Liu 2021, number 5).

    Raises GigabatchError where no class has two samples.
    """
    z = _unit(z)
    known = torch.tensor(
        sorted({c for rank in world.gather(labels.unique().tolist()) for c in rank}),
        device=labels.device, dtype=labels.dtype,
    )  # fmt: skip
    place = torch.searchsorted(known, labels)
    sums = z.new_zeros(len(known), z.shape[1]).index_add(0, place, z)
    own = z.new_zeros(len(known)).index_add(0, place, z.square().sum(1))
    counts = torch.bincount(place, minlength=len(known)).double()
    sums, own, counts = world.sum(sums), world.sum(own), world.sum(counts)
    pairs = float((counts * (counts - 1)).sum())
    if not pairs:
        raise GigabatchError("tolerance needs a class of two samples or more; all are single.")
    return float((sums.square().sum() - own.sum()) / pairs)


def isotropy(z: Tensor, world: World) -> float:
    """1 - the mean cosine over pairs i != j (Su and Xu 2022, number 30): 1 where directions
    cancel, 0 where all rows are one."""
    z = _unit(z)
    total, own = world.sum(z.sum(0)), world.sum(z.square().sum())
    count = int(world.sum(torch.tensor(len(z), device=z.device)))
    return float(1 - (total.square().sum() - own) / _pairs(count, "isotropy"))


def effective_rank(z: Tensor, world: World) -> float:
    """exp of the entropy of the singular values over their sum (Roy and Vetterli 2007; RankMe,
    Garrido et al. 2023), of the rows as they are: between 1 and the width. From the D x D Gram
    matrix, whose rounding hides singular values below about 1e-8 of the largest."""
    z = z.double()
    values = torch.linalg.eigvalsh(world.sum(z.T @ z)).clamp(min=0).sqrt()
    share = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def modality_gap(x: Tensor, y: Tensor, world: World) -> float:
    """|mean x - mean y| of unit vectors (Liang et al. 2022; number 32): at most 2."""
    return float((_centre(x, world) - _centre(y, world)).norm())


def domain_auc(x: Tensor, y: Tensor, world: World, seed: int) -> float:
    """How well a linear classifier tells x from y: it is fitted on a keyed half of each, and its
    score's AUC taken on the other half. 0.5: not at all; 1: two separate clouds."""
    rows = torch.cat([x, y])
    kind = torch.cat([torch.zeros(len(x)), torch.ones(len(y))]).long().to(x.device)
    # Keyed by the place within its own side, so that the halves do not depend on the ranks.
    test = torch.cat([held_out(len(side), world, seed, 0.5) for side in (x, y)]).to(x.device)
    probe = fit_probe(rows[~test], kind[~test], 2, GAP_L2, world)
    logits = probe.logits(rows[test])
    score = gather_rows((logits[:, 1] - logits[:, 0]).float(), world.group)
    return auc(score, gather_rows(kind[test], world.group) == 1)


def geometry(
    taps: Mapping[str, Tensor], labels: Tensor | None, world: World, seed: int
) -> dict[str, float]:
    """All of them: `TAP_uniformity`, `TAP_isotropy`, `TAP_effective_rank`, with labels
    `TAP_tolerance`; of two taps of one width `alignment`, `modality_gap`, `domain_auc`, and where
    there are more taps than two, those of every pair: `TAP_TAP_alignment` and so on."""
    told: dict[str, float] = {}
    for tap, z in taps.items():
        told[f"{tap}_uniformity"] = uniformity(z, world)
        told[f"{tap}_isotropy"] = isotropy(z, world)
        told[f"{tap}_effective_rank"] = effective_rank(z, world)
        if labels is not None:
            told[f"{tap}_tolerance"] = tolerance(z, labels, world)
    for (first, x), (second, y) in combinations(taps.items(), 2):
        if x.shape[1] == y.shape[1]:
            of = "" if len(taps) == 2 else f"{first}_{second}_"
            told[f"{of}alignment"] = alignment(x, y, world)
            told[f"{of}modality_gap"] = modality_gap(x, y, world)
            told[f"{of}domain_auc"] = domain_auc(x, y, world, seed)
    return told


def _unit(z: Tensor) -> Tensor:
    return F.normalize(z.double(), dim=-1)


def _centre(z: Tensor, world: World) -> Tensor:
    count = world.sum(torch.tensor(float(len(z)), dtype=torch.float64, device=z.device))
    return world.sum(_unit(z).sum(0)) / count


def _mean(values: Tensor, world: World) -> float:
    count = world.sum(torch.tensor(float(len(values)), dtype=torch.float64, device=values.device))
    return float(world.sum(values.sum()) / count)


def _pairs(count: int, what: str) -> int:
    if count < 2:
        raise GigabatchError(f"{what} needs two samples or more; there is {count}.")
    return count * (count - 1)
