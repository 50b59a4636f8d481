"""Multinomial logistic regression by Newton's method, with preconditioned conjugate gradients.

Minimizes f(W) = mean cross-entropy + l2 / 2 |W|^2 without a penalty of the biases, over the rows of
all ranks. First-order methods need thousands of passes over correlated features with a small l2.
Here each Newton step solves H p = -g by conjugate gradients, of which every iteration is one pass
and one reduction over ranks. The preconditioner is the Hessian with the weights p_c (1 - p_c) of a
class averaged over rows: in the axes of the features' covariance it is diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.score_rows import blocks

DECREMENT = 1e-9
"""Estimated distance to the minimum of f at which the last Newton step is taken. Newton's method
converges quadratically, so the result is much nearer."""
MAX_STEPS, MAX_INNER = 100, 300
_CACHED_VALUES = 1 << 25
"""Float64 values of rows or probabilities that are kept in memory; more are computed again."""


@dataclass(frozen=True)
class Problem:
    """The rows of all ranks.

    Attributes:
        features: Function from a slice of this rank's rows to features, float64 [b, D], of mean 0
            over all ranks' rows.
        y: This rank's classes, int64 [n].
        classes: Number of classes C.
        width: Number of features D.
        total: Number of rows of all ranks.
        world: The ranks.
    """

    features: Callable[[slice], Tensor]
    y: Tensor
    classes: int
    width: int
    total: float
    world: World

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of rows, with their features and a column of ones, float64 [b, D + 1]."""
        if len(self.y) * (self.width + 1) <= _CACHED_VALUES:
            yield from self._cached_rows
        else:
            yield from self._computed_rows()

    @cached_property
    def _cached_rows(self) -> list[tuple[slice, Tensor]]:
        return list(self._computed_rows())

    def _computed_rows(self) -> Iterator[tuple[slice, Tensor]]:
        for part in blocks(len(self.y), max(self.classes, self.width)):
            x = self.features(part)
            yield part, torch.cat([x, x.new_ones(len(x), 1)], 1)

    def zeros(self) -> Tensor:
        """Return weights and biases, float64 [C, D + 1], all 0."""
        shape = (self.classes, self.width + 1)
        return torch.zeros(shape, dtype=torch.float64, device=self.y.device)

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors [D, D] and eigenvalues [D] of the features' covariance."""
        sums = self.zeros().new_zeros(self.width, self.width)
        for _, x in self.rows():
            sums += x[:, :-1].T @ x[:, :-1]
        values, vectors = torch.linalg.eigh(self.world.sum(sums) / self.total)
        return vectors, values.clamp(min=0)

    def loss(self, w: Tensor, l2: float) -> float:
        """Return f(W)."""
        total = w.new_zeros(())
        for part, x in self.rows():
            total += _cross_entropy(x @ w.T, self.y[part])
        return float(self.world.sum(total) / self.total + l2 / 2 * w[:, :-1].square().sum())


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, y, reduction="sum")


class _Point:
    """Loss, gradient and Hessian products of a problem at weights W [C, D + 1]."""

    def __init__(self, problem: Problem, w: Tensor, l2: float) -> None:
        self.problem, self.w, self.l2 = problem, w, l2
        is_small = len(problem.y) * problem.classes <= _CACHED_VALUES
        self.cached: list[Tensor] | None = [] if is_small else None
        loss, grad, spread = w.new_zeros(()), torch.zeros_like(w), w.new_zeros(len(w))
        for part, x in problem.rows():
            logits = x @ w.T
            loss += _cross_entropy(logits, problem.y[part])
            p = logits.softmax(1)
            if self.cached is not None:
                self.cached.append(p)
            spread += (p * (1 - p)).sum(0)
            grad += p.T @ x
            grad.index_add_(0, problem.y[part], x, alpha=-1)
        sums = problem.world.sum(torch.cat([grad.flatten(), spread, loss.view(1)])) / problem.total
        self.loss = float(sums[-1] + l2 / 2 * w[:, :-1].square().sum())
        self.grad = sums[: w.numel()].view_as(w) + self._penalty(w)
        _, values = problem.axes
        spread = sums[w.numel() : -1].clamp(min=1e-12).unsqueeze(1)
        self.diagonal = torch.cat([spread * values + l2, spread], 1)

    def _penalty(self, v: Tensor) -> Tensor:
        return torch.cat([self.l2 * v[:, :-1], torch.zeros_like(v[:, -1:])], 1)

    def hessian(self, v: Tensor) -> Tensor:
        """Return H v, [C, D + 1]."""
        out = torch.zeros_like(v)
        for number, (_, x) in enumerate(self.problem.rows()):
            p = (x @ self.w.T).softmax(1) if self.cached is None else self.cached[number]
            slope = p * (x @ v.T)
            slope -= p * slope.sum(1, keepdim=True)
            out += slope.T @ x
        return self.problem.world.sum(out) / self.problem.total + self._penalty(v)

    def precondition(self, v: Tensor) -> Tensor:
        """Return an approximation of H^-1 v, [C, D + 1]."""
        vectors, _ = self.problem.axes
        along = torch.cat([v[:, :-1] @ vectors, v[:, -1:]], 1) / self.diagonal
        return torch.cat([along[:, :-1] @ vectors.T, along[:, -1:]], 1)

    def newton_direction(self, tolerance: float) -> Tensor:
        """Solve H p = -g by conjugate gradients, to a relative residual."""
        direction, residual = torch.zeros_like(self.w), -self.grad
        z = self.precondition(residual)
        step, product = z, float((residual * z).sum())
        limit = tolerance**2 * product
        for _ in range(MAX_INNER):
            if product <= limit:
                break
            h = self.hessian(step)
            curvature = float((step * h).sum())
            if curvature <= 0:  # rounding, along the constant that softmax ignores
                break
            direction = direction + product / curvature * step
            residual = residual - product / curvature * h
            z = self.precondition(residual)
            before, product = product, float((residual * z).sum())
            step = z + product / before * step
        return direction


def minimize(problem: Problem, start: Tensor, l2: float) -> Tensor:
    """Return weights and, in the last column, biases [C, D + 1] at the minimum.

    Args:
        problem: The rows; every rank must call this function.
        start: First guess [C, D + 1].
        l2: Penalty, above 0.
    """
    point, first = _Point(problem, start, l2), 0.0
    for _ in range(MAX_STEPS):
        size = float((point.grad * point.precondition(point.grad)).sum()) ** 0.5
        first = first or size
        if size == 0:
            break
        direction = point.newton_direction(min(0.25, (size / first) ** 0.5))
        decrement = -float((direction * point.grad).sum())
        length = 1.0
        while (
            problem.loss(point.w + length * direction, l2)
            > point.loss - 1e-4 * length * decrement + 1e-14
        ):
            length /= 2
            if length < 1e-6:  # the loss is flat up to rounding
                return _centered(point.w)
        point = _Point(problem, point.w + length * direction, l2)
        if decrement / 2 <= DECREMENT and length == 1:
            break
    return _centered(point.w)


def _centered(w: Tensor) -> Tensor:
    """Subtract the mean of the biases, which softmax ignores."""
    return torch.cat([w[:, :-1], w[:, -1:] - w[:, -1].mean()], 1)
