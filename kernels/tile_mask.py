"""A rule on one panel of keys, as the `tiled` back end works it out.

On a CPU `where` and `masked_fill` branch at every number: a mask without a pattern costs them
twelve times an addition, and a comparison three times. So a mask becomes a log-weight, 0 or -inf,
by arithmetic where it can; and what a rule says of few pairs, the equal ones, is done to these
pairs alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gigabatch.kernels.rules import Clause, Either, Eq, Ne, Rule, SecondScore, Table, blend
from gigabatch.kernels.sources import Panel


@dataclass
class TileMask:
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
    """A rule on one panel, and the clauses that the panel brings along. `logarithms`: all that
    use it add its log-weights, none multiplies by a mask."""

    def __init__(self, rule: Rule, panel: Panel, logarithms: bool) -> None:
        self.rule, self.panel, self.dense = rule, panel, list[Clause]()
        self.few = list[tuple[Clause, Matches]]()
        for clause in (*rule, *panel.only):
            equal = _of_equal_pairs(clause)
            found = None if equal is None else matches(equal, panel)
            if found is None:
                self.dense.append(_by_arithmetic(clause, panel) if logarithms else clause)
            else:
                self.few.append((clause, found))

    @cached_property
    def alone(self) -> Matches | None:
        """For sums over pairs: those of a lone equality, where they are few."""
        clause = self.rule[0] if len(self.rule) == 1 and not self.panel.only else None
        if not isinstance(clause, Eq) or isinstance(clause, Ne):
            return None
        return matches(clause, self.panel)

    def on(self, rows: slice, columns: slice, keys: Panel, scores: Tensor) -> TileMask | None:
        """On a tile; `keys`: the panel's `columns`. None where all pairs count alike."""
        if not self.dense and not self.few:
            return None
        mask, logs = blend(self.dense, rows, keys, scores)
        if mask is not None and logs is not None:
            logs += as_log(mask, logs.dtype)
            mask = None
        found = TileMask(mask, logs, [])
        for clause, equal in self.few:
            row, column = equal.inside(rows, columns)
            found.few.append(_log_weights(clause, rows, keys, row, column, scores))
        return found


def _by_arithmetic(clause: Clause, panel: Panel) -> Clause:
    """A mask as log-weights that no comparison makes, or the clause as it is."""
    if type(clause) is Eq:
        first, rows = panel.rows.indices(len(clause.rows))[0], clause.rows[panel.rows]
        codes = torch.cat([rows, panel.metadata[clause.keys]])
        found, numbers = torch.unique(codes, return_inverse=True)
        if len(found) <= 2**24:  # float32 holds no more of them
            of_rows, of_keys = numbers.float().tensor_split([len(rows)])
            return _Same(of_rows, of_keys, first, panel.offset)
    one, other = (clause.one, clause.other) if isinstance(clause, Either) else (clause, None)
    if isinstance(one, SecondScore) and one.at_most is not None and _finite(one, panel):
        equal = matches(other, panel) if type(other) is Eq else None
        if other is None or equal is not None:
            return _Below(SecondScore(one.rows, one.keys), one.at_most, equal, panel.offset)
    return clause


def _finite(score: SecondScore, panel: Panel) -> bool:
    """Else some scores are NaN, which a comparison leaves out and arithmetic would not."""
    return all(bool(each.isfinite().all()) for each in (score.rows, panel.metadata[score.keys]))


def _minus_infinity(positive: Tensor) -> Tensor:
    """In place: 0 stays, numbers above it become -inf (below 1e-38 a number beyond -1e30)."""
    most = torch.finfo(positive.dtype).max
    return positive.mul_(-most).mul_(most)


@dataclass(frozen=True)
class _Same:
    """`Eq` by numbers of the different values, which subtract exactly: `rows` float of the rows
    from the `first` on, `keys` float [m]."""

    rows: Tensor
    keys: Tensor
    first: int
    offset: int

    def block(self, rows: slice, panel: Panel, scores: Tensor) -> Tensor:
        start = panel.offset - self.offset
        keys = self.keys[start : start + len(panel.keys)]
        own = self.rows[rows.start - self.first : rows.stop - self.first]
        return _minus_infinity((own.unsqueeze(1) - keys).square_()).to(scores.dtype)


@dataclass(frozen=True)
class _Below:
    """Scores up to `at_most`; `also`: pairs that count whatever their score is."""

    score: SecondScore
    at_most: float
    also: Matches | None
    offset: int

    def block(self, rows: slice, panel: Panel, scores: Tensor) -> Tensor:
        start = panel.offset - self.offset
        t = self.score.block(rows, panel, scores)
        logs = _minus_infinity(t.sub_(self.at_most).clamp_(min=0))
        if self.also is not None:
            logs[self.also.inside(rows, slice(start, start + len(panel.keys)))] = 0
        return logs.to(scores.dtype)


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
