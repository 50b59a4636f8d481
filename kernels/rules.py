"""Rules: which pairs of a query and a key count, and with what weight.

A rule is a sequence of clauses; all of them apply. A clause is a mask (bool: the pair counts or
not) or a log-weight (float: its exp multiplies the pair's term). It compares a value of each row,
`rows` [M, ...], with a metadata column of the key source, named `keys`. So a rule needs O(N)
metadata, and nothing of size M x N is stored. Clause tensors are constants: they get no gradient
and must not change before the backward pass. The list of clauses is closed: each has one method
here and one function in each compiled back end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gigabatch.kernels.sources import KeyBlock, accumulator_dtype


class Clause(Protocol):
    """One condition or weight of a rule."""

    def evaluate(self, rows: slice, block: KeyBlock, scores: Tensor) -> Tensor:
        """Return the mask (bool) or log-weights (float) of some rows and a block's keys.

        Args:
            rows: Range of r rows.
            block: c keys with their metadata.
            scores: [r, c] scores of these pairs.

        Returns:
            [r, c] bool or float, a new tensor that the caller may overwrite.
        """


Rule = Sequence[Clause]


@dataclass(frozen=True)
class Eq:
    """Mask: equal values.

    Examples are the same id, class, group or language; by index, the row's own key.

    Args:
        rows: [M] values of the rows.
        keys: Name of the keys' column.
    """

    rows: Tensor
    keys: str

    def evaluate(self, rows: slice, block: KeyBlock, scores: Tensor) -> Tensor:
        return self.rows[rows].unsqueeze(1) == block.metadata[self.keys]


class Ne(Eq):
    """Mask: different values. Examples are a different row or a different class."""

    def evaluate(self, rows: slice, block: KeyBlock, scores: Tensor) -> Tensor:
        return self.rows[rows].unsqueeze(1) != block.metadata[self.keys]


@dataclass(frozen=True)
class Either:
    """Mask: at least one of two masks holds. An example is a different id, or the row's own key."""

    one: Clause
    other: Clause

    def evaluate(self, rows: slice, block: KeyBlock, scores: Tensor) -> Tensor:
        return self.one.evaluate(rows, block, scores) | self.other.evaluate(rows, block, scores)


@dataclass(frozen=True)
class Table:
    """Log-weight `table[row's code, key's code]`, by role or relation.

    Args:
        rows: int64 [M] codes of the rows.
        keys: Name of the keys' int64 column.
        table: float [A, B]; -inf masks a pair.
        only: Mask; pairs outside it have log-weight 0. With it, a row's own reversed sample can
            have a different weight from the reversed samples of other rows.
    """

    rows: Tensor
    keys: str
    table: Tensor
    only: Clause | None = None

    def evaluate(self, rows: slice, block: KeyBlock, scores: Tensor) -> Tensor:
        # Indexing by key first makes the second indexing copy complete rows.
        weights = self.table[:, block.metadata[self.keys]].index_select(0, self.rows[rows])
        if self.only is not None:
            weights.masked_fill_(~self.only.evaluate(rows, block, scores), 0)
        return weights


@dataclass(frozen=True)
class AbsDiff:
    """Log-weight log(factor_i |y_i - y_j| + 1): negatives with a more distant label weigh more.

    Used by SupReMix.

    Args:
        rows: [M] labels of the rows, integer or floating.
        keys: Name of the keys' column of labels.
        factor: float [M]; None is 1. Mixtures lam y_i + (1 - lam) y_j use 1 - lam.
    """

    rows: Tensor
    keys: str
    factor: Tensor | None = None

    def evaluate(self, rows: slice, block: KeyBlock, scores: Tensor) -> Tensor:
        distance = (self.rows[rows].unsqueeze(1) - block.metadata[self.keys]).abs_()
        if not distance.is_floating_point():
            distance = distance.to(scores.dtype)
        if self.factor is not None:
            distance *= self.factor[rows, None]
        return distance.log1p_()


@dataclass(frozen=True)
class SecondScore:
    """Mask or log-weight from a second score t_ij = <rows_i, column_j>, without gradient.

    Args:
        rows: [M, E] vectors of the rows.
        keys: Name of the keys' column of vectors, [n, E].
        at_most: If given, the clause is the mask t_ij <= at_most, which drops pairs that a teacher
            marks as false negatives (MultiCSR).
        scale: Otherwise, the clause is the log-weight scale t_ij: a teacher's softmax, up to
            normalization, as soft positives.
    """

    rows: Tensor
    keys: str
    at_most: float | None = None
    scale: float = 1.0

    def evaluate(self, rows: slice, block: KeyBlock, scores: Tensor) -> Tensor:
        dtype = accumulator_dtype(self.rows.dtype)
        t = self.rows[rows].to(dtype) @ block.metadata[self.keys].to(dtype).T
        return self.scale * t if self.at_most is None else t <= self.at_most


@dataclass(frozen=True)
class AtLeast:
    """Mask s_ij >= rows_i: only keys whose score reaches a threshold.

    The threshold may be a quantile of the row's scores, from `row_top`. Put it between two scores:
    a score may round differently in a different tile.

    Args:
        rows: [M] thresholds.
    """

    rows: Tensor

    def evaluate(self, rows: slice, block: KeyBlock, scores: Tensor) -> Tensor:
        return scores >= self.rows[rows].unsqueeze(1)


def combine_ids(ids: Tensor, groups: Tensor) -> Tensor:
    """Return int64 [n] codes that are equal where both ids and groups are.

    Different pairs collide with a probability of about 2^-64. A single `Eq` of the codes costs
    nothing per tile, unlike two clauses.
    """
    return ids * -7046029254386353131 + groups * -4417276706812531889


def check_rule(rule: Rule, m: int) -> None:
    """Check the row values of all clauses.

    Raises:
        ValueError: if a clause's row values are not [m, ...] or require a gradient.
    """
    for clause in rule:
        for name, value in vars(clause).items():
            argument = f"{type(clause).__name__}.{name}"
            if not isinstance(value, Tensor):
                check_rule([value] if hasattr(value, "evaluate") else [], m)
            elif name != "table" and len(value) != m:
                raise ValueError(f"{argument} must have {m} entries, one per row; got {len(value)}")
            elif value.requires_grad:
                raise ValueError(f"{argument} requires a gradient, but rules are constants; learn "
                                 "a scale or a bias instead, or detach it")  # fmt: skip


def combine_clauses(
    rule: Rule, rows: slice, block: KeyBlock, scores: Tensor
) -> tuple[Tensor | None, ...]:
    """Evaluate all clauses on one tile. Returns (mask, log-weights), each None if no clause
    has one."""
    mask = weights = None
    for clause in (*rule, *block.clauses):
        values = clause.evaluate(rows, block, scores)
        if values.dtype == torch.bool:
            mask = values if mask is None else mask & values
        elif weights is None:
            weights = values
        elif weights.dtype == values.dtype:
            weights += values  # in place, so that no third tile is allocated
        else:
            weights = weights + values
    return mask, weights
