"""Rules say which pairs count and how much, from O(N) metadata; nothing of size M x N is stored.

A rule is a sequence of clauses that hold together. A clause is a mask (bool: the pair counts or
does not) or a log-weight (float: its exp multiplies the pair's term). It sets a value of each row,
`rows` [M, ...], against a metadata column of the key source, named `keys`; all are constants, not
to be changed before the backward pass. The list is closed: a clause has one function here and one
in each compiled back end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gigabatch.kernels.sources import Panel, wide


class Clause(Protocol):
    def block(self, rows: slice, panel: Panel, scores: Tensor) -> Tensor:
        """Mask or log-weights [r, c] of pairs of `rows` and a panel's keys with these `scores`."""


Rule = Sequence[Clause]


@dataclass(frozen=True)
class Eq:
    """Mask: equal values. Same id, class, group, language; by number, the row's own key."""

    rows: Tensor
    keys: str

    def block(self, rows: slice, panel: Panel, scores: Tensor) -> Tensor:
        return self.rows[rows].unsqueeze(1) == panel.metadata[self.keys]


class Ne(Eq):
    """Mask: different values. Not itself, not of the same class."""

    def block(self, rows: slice, panel: Panel, scores: Tensor) -> Tensor:
        return self.rows[rows].unsqueeze(1) != panel.metadata[self.keys]


@dataclass(frozen=True)
class Either:
    """Mask: one of two masks holds. Another id, or the row's own key."""

    one: Clause
    other: Clause

    def block(self, rows: slice, panel: Panel, scores: Tensor) -> Tensor:
        return self.one.block(rows, panel, scores) | self.other.block(rows, panel, scores)


@dataclass(frozen=True)
class Table:
    """Log-weight `table[row's code, key's code]` by role or relation; codes int64, `table` float
    [A, B], -inf to mask. `only`: a mask outside which it does not apply, so that a row's own
    reversal weighs otherwise than a stranger's."""

    rows: Tensor
    keys: str
    table: Tensor
    only: Clause | None = None

    def block(self, rows: slice, panel: Panel, scores: Tensor) -> Tensor:
        # Keys first: then whole rows are copied.
        weights = self.table[:, panel.metadata[self.keys]].index_select(0, self.rows[rows])
        if self.only is not None:
            weights.masked_fill_(~self.only.block(rows, panel, scores), 0)
        return weights


@dataclass(frozen=True)
class AbsDiff:
    """Log-weight log(factor_i |y_i - y_j| + 1): the farther the labels, the stronger a negative
    (SupReMix, number 42). `factor`: float [M]; 1 without it, 1 - lambda for mixtures."""

    rows: Tensor
    keys: str
    factor: Tensor | None = None

    def block(self, rows: slice, panel: Panel, scores: Tensor) -> Tensor:
        distance = (self.rows[rows].unsqueeze(1) - panel.metadata[self.keys]).abs_()
        if not distance.is_floating_point():
            distance = distance.to(scores.dtype)
        if self.factor is not None:
            distance *= self.factor[rows, None]
        return distance.log1p_()


@dataclass(frozen=True)
class SecondScore:
    """By another score t_ij = <rows_i, column_j>, without gradient; vectors [M, E] and [n, E].

    `at_most`: the mask t_ij <= at_most, without a teacher's false negatives (MultiCSR, number 39).
    Else the log-weight `scale` t_ij: a teacher's softmax, up to its sum, as soft positives.
    """

    rows: Tensor
    keys: str
    at_most: float | None = None
    scale: float = 1.0

    def block(self, rows: slice, panel: Panel, scores: Tensor) -> Tensor:
        kind = wide(self.rows.dtype)
        t = self.rows[rows].to(kind) @ panel.metadata[self.keys].to(kind).T
        return self.scale * t if self.at_most is None else t <= self.at_most


@dataclass(frozen=True)
class AtLeast:
    """Mask s_ij >= rows_i: only keys whose score reaches a threshold, such as a row's quantile
    (`row_top`). Put thresholds between two scores: the same score may round differently."""

    rows: Tensor

    def block(self, rows: slice, panel: Panel, scores: Tensor) -> Tensor:
        return scores >= self.rows[rows].unsqueeze(1)


def joined(ids: Tensor, groups: Tensor) -> Tensor:
    """int64 [n]: codes that are equal where both are, but for an accident of 64 bits. A lone `Eq`
    of them costs nothing a tile, where two together would."""
    return ids * -7046029254386353131 + groups * -4417276706812531889


def check_rule(rule: Rule, m: int) -> None:
    """ValueError for clauses whose row values do not fit [m, ...] or would want a gradient."""
    for clause in rule:
        for name, value in vars(clause).items():
            what = f"{type(clause).__name__}.{name}"
            if not isinstance(value, Tensor):
                check_rule([value] if hasattr(value, "block") else [], m)
            elif name != "table" and len(value) != m:
                raise ValueError(f"{what} must have {m} entries, one a row; got {len(value)}")
            elif value.requires_grad:
                raise ValueError(f"{what} wants a gradient; rules are constants, what is learnt is "
                                 "a scale or a bias")  # fmt: skip


def blend(rule: Rule, rows: slice, panel: Panel, scores: Tensor) -> tuple[Tensor | None, ...]:
    """All clauses on one tile: (mask, log-weights), each None where nothing is said."""
    mask = weights = None
    for clause in (*rule, *panel.only):
        block = clause.block(rows, panel, scores)
        if block.dtype == torch.bool:
            mask = block if mask is None else mask & block
        elif weights is None:
            weights = block
        elif weights.dtype == block.dtype:
            weights += block  # a clause's block is its own: no third one is made
        else:
            weights = weights + block
    return mask, weights
