"""A rule on one panel of keys, as the `tiled` back end works it out.

On a CPU `where` and `masked_fill` branch at every number: a mask without a pattern costs them
twelve times an addition. So a mask becomes a log-weight, 0 or -inf; and what a rule says of few
pairs, the equal ones, is done to these pairs alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gigabatch.kernels.rules import Clause, Either, Eq, Ne, Rule, Table, blend
from gigabatch.kernels.sources import Panel


@dataclass
class Weighing:
    """Of the pairs of a tile [r, c]: a bool `mask` or log-weights `logs`, or neither; and for each
    of `few` lists of pairs (row, column), each pair once, what is added to their log-weights."""

    mask: Tensor | None
    logs: Tensor | None
    few: list[tuple[Tensor, Tensor, Tensor]]

    def add_to(self, logits: Tensor) -> None:
        if self.mask is not None:
            logits += as_log(self.mask, logits.dtype)
        elif self.logs is not None:
            logits += self.logs
        for row, column, value in self.few:
            logits[row, column] = logits[row, column] + value

    def multiply(self, values: Tensor) -> Tensor:
        """Values, in place, times their pairs' weights; 0 where a pair does not count, whatever
        it holds."""
        if self.mask is not None:
            values.masked_fill_(~self.mask, 0)
        elif self.logs is not None:
            values.mul_(self.logs.exp()).masked_fill_(self.logs == -torch.inf, 0)
        for row, column, value in self.few:
            found = values[row, column] * value.exp()
            values[row, column] = torch.where(value > -torch.inf, found, 0)
        return values


def as_log(mask: Tensor, kind: torch.dtype) -> Tensor:
    """0 where a mask holds, else -inf, without a branch: 1 - 1 / mask."""
    return mask.to(kind).reciprocal_().neg_().add_(1)


class OnPanel:
    """A rule on one panel, and the clauses that the panel brings along."""

    def __init__(self, rule: Rule, panel: Panel) -> None:
        self.rule, self.panel, self.dense = rule, panel, list[Clause]()
        self.few = list[tuple[Clause, Matches]]()
        for clause in (*rule, *panel.only):
            equal = _of_equal_pairs(clause)
            found = None if equal is None else matches(equal, panel)
            if found is None:
                self.dense.append(clause)
            else:
                self.few.append((clause, found))

    @cached_property
    def alone(self) -> Matches | None:
        """For sums over pairs: those of a lone equality, where they are few."""
        clause = self.rule[0] if len(self.rule) == 1 and not self.panel.only else None
        if not isinstance(clause, Eq) or isinstance(clause, Ne):
            return None
        return matches(clause, self.panel)

    def on(self, rows: slice, columns: slice, keys: Panel, scores: Tensor) -> Weighing | None:
        """On a tile; `keys`: the panel's `columns`. None where all pairs count alike."""
        if not self.dense and not self.few:
            return None
        mask, logs = blend(self.dense, rows, keys, scores)
        if mask is not None and logs is not None:
            logs += as_log(mask, logs.dtype)
            mask = None
        found = Weighing(mask, logs, [])
        for clause, equal in self.few:
            row, column = equal.inside(rows, columns)
            found.few.append(_log_weights(clause, rows, keys, row, column, scores))
        return found


def _of_equal_pairs(clause: Clause) -> Eq | None:
    """The equality whose pairs are all that a clause says something of."""
    if isinstance(clause, Either):
        return clause.one if isinstance(clause.one, Ne) and isinstance(clause.other, Eq) else None
    equal = clause.only if isinstance(clause, Table) else clause
    wanted = isinstance(equal, Eq) and isinstance(equal, Ne) == (equal is clause)
    return equal if wanted else None  # type: ignore[return-value]


def _log_weights(
    clause: Clause, rows: slice, keys: Panel, row: Tensor, column: Tensor, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, log-weight) of a clause's equal pairs on a tile."""
    if isinstance(clause, Table):
        codes = clause.rows[rows][row], keys.metadata[clause.keys][column]
        return row, column, clause.table[codes].to(like.dtype)
    if isinstance(clause, Either) and isinstance(clause.other, Eq):
        other = clause.other
        same = other.rows[rows][row] == keys.metadata[other.keys][column]
        left = same if isinstance(other, Ne) else ~same
        row, column = row[left], column[left]
    return row, column, like.new_full(row.shape, -torch.inf)


def matches(clause: Eq, panel: Panel) -> Matches | None:
    """The equal pairs, unless they are so many that a mask takes less."""
    if clause.rows.dtype != panel.metadata[clause.keys].dtype:
        return None
    found = Matches(clause, panel)
    return None if found.many else found


class Matches:
    """`Eq` on one panel, its codes sorted once: a tile then costs its own pairs, not its area."""

    def __init__(self, clause: Eq, panel: Panel) -> None:
        self.rows, self._block = clause.rows, slice(0)
        self.codes, self.order = torch.sort(panel.metadata[clause.keys], stable=True)
        rows = self.rows[panel.rows]
        low, high = (torch.searchsorted(self.codes, rows, right=right) for right in (False, True))
        # Listing more of them than this would take more than a mask.
        self.many = 32 * int((high - low).sum()) > len(rows) * len(self.codes)

    def inside(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """(row, key) of the equal pairs of a tile, both counted from its first. Those of its block
        of rows are kept for the next tile."""
        if rows != self._block:
            low = torch.searchsorted(self.codes, self.rows[rows])
            count = torch.searchsorted(self.codes, self.rows[rows], right=True) - low
            row, start = torch.repeat_interleave(count), torch.cumsum(count, 0) - count
            nth = torch.arange(row.numel(), device=row.device) - start[row]
            self._block, self._pairs = rows, (row, self.order[low[row] + nth])
        row, key = self._pairs
        here = (key >= columns.start) & (key < columns.stop)
        return row[here], key[here] - columns.start
