"""Tile masks: rules evaluated on one key block, for the `tiled` back end.

On a CPU, `where` and `masked_fill` branch per element: an irregular mask costs about 12 times as
much as an addition, a comparison 3 times. Where possible, a mask is therefore computed
arithmetically as log-weights (0 or -inf), and a clause that affects only a few equal pairs is
applied to those pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gigabatch.kernels.rules import (
    Clause,
    Either,
    Eq,
    Ne,
    Rule,
    SecondScore,
    Table,
    combine_clauses,
)
from gigabatch.kernels.sources import KeyBlock


@dataclass
class TileMask:
    """A rule evaluated on one tile [r, c].

    Attributes:
        mask: bool [r, c], or None.
        log_weights: float [r, c], or None. At most one of the two is set.
        listed: Lists of pairs (row, column, value); each value is added to its pair's log-weight.
            No list holds a pair twice.
    """

    mask: Tensor | None
    log_weights: Tensor | None
    listed: list[tuple[Tensor, Tensor, Tensor]]

    def add_to(self, logits: Tensor) -> None:
        """Add log-weights to logits [r, c], in place; a masked pair becomes -inf."""
        if self.mask is not None:
            logits += mask_to_log(self.mask, logits.dtype)
        elif self.log_weights is not None:
            logits += self.log_weights
        for row, column, value in self.listed:
            logits[row, column] = logits[row, column] + value

    def multiply(self, values: Tensor) -> Tensor:
        """Multiply values [r, c] by their pairs' weights, in place; a masked pair becomes 0, even
        if it holds NaN."""
        if self.mask is not None:
            values.masked_fill_(~self.mask, 0)
        elif self.log_weights is not None:
            values.mul_(self.log_weights.exp()).masked_fill_(self.log_weights == -torch.inf, 0)
        for row, column, value in self.listed:
            weighted = values[row, column] * value.exp()
            values[row, column] = torch.where(value > -torch.inf, weighted, 0)
        return values


def mask_to_log(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a mask holds, else -inf, without a branch: 1 - 1 / mask."""
    return mask.to(dtype).reciprocal_().neg_().add_(1)


class BlockRule:
    """A rule prepared for one key block, together with the block's own clauses.

    Args:
        rule: Clauses.
        block: Keys.
        log_weights_only: Whether all reductions with this rule add log-weights to their logits,
            and none multiplies by a mask.
    """

    def __init__(self, rule: Rule, block: KeyBlock, log_weights_only: bool) -> None:
        self.rule, self.block, self.dense = rule, block, list[Clause]()
        self.sparse = list[tuple[Clause, EqualPairs]]()
        for clause in (*rule, *block.clauses):
            equality = _deciding_equality(clause)
            pairs = None if equality is None else few_equal_pairs(equality, block)
            if pairs is None:
                self.dense.append(_without_branches(clause, block) if log_weights_only else clause)
            else:
                self.sparse.append((clause, pairs))

    @cached_property
    def listed(self) -> EqualPairs | None:
        """Pairs that a sum over pairs visits, if the rule is one equality with few pairs."""
        clause = self.rule[0] if len(self.rule) == 1 and not self.block.clauses else None
        if not isinstance(clause, Eq) or isinstance(clause, Ne):
            return None
        return few_equal_pairs(clause, self.block)

    def on_tile(
        self, rows: slice, columns: slice, keys: KeyBlock, scores: Tensor
    ) -> TileMask | None:
        """Evaluate the rule on a tile; `keys` are the block's `columns`. None if all pairs count
        with weight 1."""
        if not self.dense and not self.sparse:
            return None
        mask, log_weights = combine_clauses(self.dense, rows, keys, scores)
        if mask is not None and log_weights is not None:
            log_weights += mask_to_log(mask, log_weights.dtype)
            mask = None
        tile_mask = TileMask(mask, log_weights, [])
        for clause, pairs in self.sparse:
            row, column = pairs.in_tile(rows, columns)
            tile_mask.listed.append(_pair_log_weights(clause, rows, keys, row, column, scores))
        return tile_mask


def _without_branches(clause: Clause, block: KeyBlock) -> Clause:
    """Return a clause that computes a mask as log-weights without comparisons; if there is none,
    return the clause unchanged."""
    if type(clause) is Eq:
        first, rows = block.rows.indices(len(clause.rows))[0], clause.rows[block.rows]
        codes = torch.cat([rows, block.metadata[clause.keys]])
        values, ranks = torch.unique(codes, return_inverse=True)
        if len(values) <= 2**24:  # float32 represents larger ranks inexactly
            row_ranks, key_ranks = ranks.float().tensor_split([len(rows)])
            return _EqualRanks(row_ranks, key_ranks, first, block.offset)
    one, other = (clause.one, clause.other) if isinstance(clause, Either) else (clause, None)
    if isinstance(one, SecondScore) and one.at_most is not None and _is_finite(one, block):
        pairs = few_equal_pairs(other, block) if type(other) is Eq else None
        if other is None or pairs is not None:
            return _AtMost(SecondScore(one.rows, one.keys), one.at_most, pairs, block.offset)
    return clause


def _is_finite(score: SecondScore, block: KeyBlock) -> bool:
    """Return whether all values are finite. A comparison with NaN is false, but arithmetic would
    propagate it."""
    vectors = (score.rows, block.metadata[score.keys])
    return all(bool(tensor.isfinite().all()) for tensor in vectors)


def _positive_to_minus_infinity(values: Tensor) -> Tensor:
    """Replace positive values by -inf, in place; 0 stays 0. Values below about 1e-38 become large
    negative finite numbers (< -1e30) instead of -inf."""
    largest = torch.finfo(values.dtype).max
    return values.mul_(-largest).mul_(largest)


@dataclass(frozen=True)
class _EqualRanks:
    """`Eq` on the ranks of the distinct values; float32 subtracts ranks exactly.

    `rows` are the ranks of the rows from `first` on, `keys` those of the block's m keys; float32.
    """

    rows: Tensor
    keys: Tensor
    first: int
    offset: int

    def evaluate(self, rows: slice, block: KeyBlock, scores: Tensor) -> Tensor:
        start = block.offset - self.offset
        keys = self.keys[start : start + len(block.keys)]
        row_ranks = self.rows[rows.start - self.first : rows.stop - self.first]
        differences = (row_ranks.unsqueeze(1) - keys).square_()
        return _positive_to_minus_infinity(differences).to(scores.dtype)


@dataclass(frozen=True)
class _AtMost:
    """Mask `score` <= `at_most` as log-weights; pairs in `exempt` always count."""

    score: SecondScore
    at_most: float
    exempt: EqualPairs | None
    offset: int

    def evaluate(self, rows: slice, block: KeyBlock, scores: Tensor) -> Tensor:
        start = block.offset - self.offset
        t = self.score.evaluate(rows, block, scores)
        log_weights = _positive_to_minus_infinity(t.sub_(self.at_most).clamp_(min=0))
        if self.exempt is not None:
            log_weights[self.exempt.in_tile(rows, slice(start, start + len(block.keys)))] = 0
        return log_weights.to(scores.dtype)


def _deciding_equality(clause: Clause) -> Eq | None:
    """Return the `Eq` whose equal pairs are the only pairs that the clause affects, or None."""
    if isinstance(clause, Either):
        return clause.one if isinstance(clause.one, Ne) and isinstance(clause.other, Eq) else None
    equality = clause.only if isinstance(clause, Table) else clause
    # `Ne` masks the equal pairs; a table limited to an `Eq` weighs them.
    if isinstance(equality, Eq) and isinstance(equality, Ne) == (equality is clause):
        return equality
    return None


def _pair_log_weights(
    clause: Clause, rows: slice, keys: KeyBlock, row: Tensor, column: Tensor, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row, column, log-weight) of a clause's equal pairs on a tile."""
    if isinstance(clause, Table):
        codes = clause.rows[rows][row], keys.metadata[clause.keys][column]
        return row, column, clause.table[codes].to(like.dtype)
    if isinstance(clause, Either) and isinstance(clause.other, Eq):
        other = clause.other
        same = other.rows[rows][row] == keys.metadata[other.keys][column]
        masked = same if isinstance(other, Ne) else ~same
        row, column = row[masked], column[masked]
    return row, column, like.new_full(row.shape, -torch.inf)


def few_equal_pairs(clause: Eq, block: KeyBlock) -> EqualPairs | None:
    """Return the equal pairs, or None if there are so many that a mask takes less memory."""
    if clause.rows.dtype != block.metadata[clause.keys].dtype:
        return None
    pairs = EqualPairs(clause, block)
    return None if pairs.too_many else pairs


class EqualPairs:
    """Pairs of equal values on one key block.

    The values are sorted once, so that the cost of a tile is its number of pairs, not its area.
    """

    def __init__(self, clause: Eq, block: KeyBlock) -> None:
        self.rows, self._cached_rows = clause.rows, slice(0)
        self.codes, self.order = torch.sort(block.metadata[clause.keys], stable=True)
        rows = self.rows[block.rows]
        low, high = (torch.searchsorted(self.codes, rows, right=right) for right in (False, True))
        # A listed pair takes 32 times the memory of a mask's entry.
        self.too_many = 32 * int((high - low).sum()) > len(rows) * len(self.codes)

    def in_tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return (row, column) of a tile's pairs, counted from its first row and column.

        The pairs of a range of rows are kept for the next tile of the same rows.
        """
        if rows != self._cached_rows:
            low = torch.searchsorted(self.codes, self.rows[rows])
            count = torch.searchsorted(self.codes, self.rows[rows], right=True) - low
            row, start = torch.repeat_interleave(count), torch.cumsum(count, 0) - count
            nth = torch.arange(row.numel(), device=row.device) - start[row]
            self._cached_rows, self._pairs = rows, (row, self.order[low[row] + nth])
        row, key = self._pairs
        inside = (key >= columns.start) & (key < columns.stop)
        return row[inside], key[inside] - columns.start
