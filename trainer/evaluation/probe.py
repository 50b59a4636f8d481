"""A linear probe: multinomial logistic regression on frozen embeddings, sharded over ranks.

Minimises mean cross-entropy + l2 / 2 |W|^2 (the bias is free) over standardised features, by
full-batch L-BFGS in float64 (as CLIP's evaluation, Radford et al. 2021, appendix A.3). With l2 > 0
the minimum is unique: the result does not depend on the ranks. `l2` is chosen on a part of the
training samples, then all of them are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key, uniforms
from gigabatch.kernels import gather_rows
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.classify import LABEL, classified
from gigabatch.trainer.evaluation.score_rows import blocks

L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
HELD_OUT = 0.2
"""Share of the training samples that chooses l2."""


@dataclass(frozen=True)
class Standard:
    """Features minus `mean` over `scale`, both float64 [D]: zero mean, unit variance."""

    mean: Tensor
    scale: Tensor

    @staticmethod
    def of(x: Tensor, world: World) -> Standard:
        """By all ranks' rows; a feature that is constant keeps its scale."""
        count = world.sum(torch.tensor(float(len(x)), dtype=torch.float64, device=x.device))
        mean = world.sum(x.double().sum(0)) / count
        variance = world.sum((x.double() - mean).square().sum(0)) / count
        flat = variance <= 1e-12 * mean.square().clamp(min=1e-12)
        return Standard(mean, torch.where(flat, 1.0, variance.sqrt()))

    def __call__(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) / self.scale


@dataclass(frozen=True)
class Probe:
    """`weight` float64 [C, D], `bias` [C], of standardised features."""

    standard: Standard
    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """float64 [n, C]."""
        return self.standard(x) @ self.weight.T + self.bias


def fit_probe(
    x: Tensor, y: Tensor, classes: int, l2: float, world: World, start: Probe | None = None
) -> Probe:
    """The probe of all ranks' rows: `x` [n, D], `y` int64 [n], class numbers. Called on every rank
    alike. Raises GigabatchError for features that are not finite."""
    bad = world.sum(torch.tensor(float((~x.isfinite()).any()), device=x.device))
    if bad:
        raise GigabatchError("a probe needs finite features; some are NaN or infinite.")
    standard = start.standard if start else Standard.of(x, world)
    total = world.sum(torch.tensor(float(len(x)), dtype=torch.float64, device=x.device))
    held = torch.zeros(classes, x.shape[1] + 1, dtype=torch.float64, device=x.device)
    if start:
        held = torch.cat([start.weight, start.bias.unsqueeze(1)], 1)
    held.requires_grad_()
    solver = torch.optim.LBFGS(
        [held], max_iter=1000, history_size=20, tolerance_grad=1e-7, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        grad, loss = torch.zeros_like(held), held.new_zeros(())
        for part in blocks(len(x), classes):
            rows = torch.cat([standard(x[part]), x.new_ones(len(x[part]), 1).double()], 1)
            logits = rows @ held.detach().T
            loss += torch.nn.functional.cross_entropy(logits, y[part], reduction="sum")
            slope = logits.softmax(1)
            slope[torch.arange(len(rows), device=x.device), y[part]] -= 1
            grad += slope.T @ rows
        both = world.sum(torch.cat([grad.flatten(), loss.view(1)])) / total
        weight = held.detach().clone()
        weight[:, -1] = 0
        held.grad = both[:-1].view_as(held) + l2 * weight
        return both[-1] + l2 / 2 * weight.square().sum()

    solver.step(closure)
    found = held.detach()
    return Probe(standard, found[:, :-1].clone(), found[:, -1].clone())


def choose_l2(
    x: Tensor, y: Tensor, classes: int, world: World, seed: int, grid: Sequence[float] = L2
) -> float:
    """Of `grid`, what is right most often on the held-out fifth; of equal ones the largest."""
    held = held_out(len(x), world, seed, HELD_OUT).to(x.device)
    best, chosen, probe = -1.0, grid[0], None
    for l2 in sorted(grid, reverse=True):  # each starts where the last one ended
        probe = fit_probe(x[~held], y[~held], classes, l2, world, probe)
        right = (probe.logits(x[held]).argmax(1) == y[held]).sum().double()
        if (share := float(world.sum(right))) > best:
            best, chosen = share, l2
    return chosen


def held_out(rows: int, world: World, seed: int, share: float) -> Tensor:
    """bool [rows]: this rank's part of a keyed choice among all ranks' rows."""
    counts = world.gather(rows)
    first = sum(counts[: world.rank])
    drawn = uniforms(key(seed, "held out"), sum(counts), 1)[first : first + rows, 0]
    return torch.from_numpy(drawn < share)


def linear_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], world: World, seed: int
) -> tuple[dict[str, Tensor], float]:
    """(`top1`, `top5` and `label` of every test sample, on every rank; the l2 chosen).

    `train`, `test`: this rank's features [n, D] and int64 labels [n], of any values. A test label
    that was not trained on is never right.
    """
    (x, y), (test_x, test_y) = train, test
    known = sorted({label for rank in world.gather(y.unique().tolist()) for label in rank})
    labels = torch.tensor(known, device=y.device)
    y = torch.searchsorted(labels, y)
    l2 = choose_l2(x, y, len(known), world, seed)
    probe = fit_probe(x, y, len(known), l2, world)
    place = torch.searchsorted(labels, test_y).clamp(max=len(known) - 1)
    seen = labels[place] == test_y

    def score(part: slice) -> Tensor:
        logits = probe.logits(test_x[part]).float()
        logits[~seen[part], place[part][~seen[part]]] = -torch.inf
        return logits

    figures = classified(score, place, len(known), world)
    return figures | {LABEL: gather_rows(test_y, world.group)}, l2
