"""Back end `tiled`: contrastive sums and gradients in plain PyTorch, on any device.

Scores are computed tile by tile; only a `ScoreCache` keeps some of them for the backward pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels.cache import ScoreCache, cached_tile
from gigabatch.kernels.rules import Rule, combine_clauses
from gigabatch.kernels.scores import Score
from gigabatch.kernels.sources import KeyBlock, accumulator_dtype, add_rows
from gigabatch.kernels.tile_mask import BlockRule, TileMask

ROWS, COLUMNS = 512, 4096  # a tile takes 8 MiB in float32, which stays in cache between uses
# Use exp2 of the scaled difference instead of exp: on a CPU, exp takes 25 times as long where its
# result is subnormal, as most results are late in training. Logits and z are natural logarithms:
# rounding z in base 2 would add noise to every probability of 1.
LOG2E = math.log2(math.e)

# Functions of a logit, and their derivatives, which may overwrite the logit. Beyond 40,
# log(1 + exp x) equals x in float32 and float64.
PHI: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softplus": (lambda x: F.softplus(x, threshold=40), torch.sigmoid_),
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "step": (lambda x: (~(x < 0)).to(x.dtype), torch.zeros_like),  # NaN counts
    "linear": (lambda x: x, torch.ones_like),
    "one": (torch.ones_like, torch.zeros_like),
}


@dataclass(frozen=True)
class Reduction:
    """Reduction of the logits x_ij = scale_i s_ij + shift_i + bias_j, with weights w_ij of a rule:

        phi "lse": log sum_j w_ij exp(x_ij)        else: sum_j w_ij phi(x_ij)

    i is the row if `on_rows`, else the key. Values along i have [M] or the block's [m] entries;
    `bias` has one entry for each j. Results are added to the fields that are not None.

    Attributes:
        on_rows: Reduce over keys, for each row; else over rows, for each key.
        phi: "lse" or a name in `PHI`.
        rule: Which pairs count, and with what weight.
        scale: 0-dim or one entry for each i.
        shift: None, 0-dim or one entry for each i.
        bias: None or one entry for each j.
        z: Results of an "lse", needed for its gradient.
        g: Gradient of the results; with it the gradients below are computed.
        out: Results.
        dscale: Gradient of `scale`.
        dshift: Gradient of `shift`.
        dbias: Gradient of `bias`.
    """

    on_rows: bool
    phi: str
    rule: Rule
    scale: Tensor
    shift: Tensor | None = None
    bias: Tensor | None = None
    z: Tensor | None = None
    g: Tensor | None = None
    out: Tensor | None = None
    dscale: Tensor | None = None
    dshift: Tensor | None = None
    dbias: Tensor | None = None


def sweep(
    score: Score, block: KeyBlock, reductions: Sequence[Reduction],
    drows: Sequence[Tensor] = (), dk: Tensor | None = None, cache: ScoreCache | None = None,
) -> None:  # fmt: skip
    """Accumulate all reductions over one key block; with `drows`, also gradients.

    Args:
        score: Similarity function over M queries.
        block: m keys.
        reductions: Reductions whose `out` and gradients are added to.
        drows: Gradients [M, ...] of the score's operands, added to.
        dk: Gradient [m, ...] of the keys, added to; None if the keys are constants.
        cache: Scores that a pass without gradients stores for the next pass, with gradients.
    """
    masked = {id(reduction.rule) for reduction in reductions if reduction.phi != "lse"}
    rules = {
        id(reduction.rule): BlockRule(reduction.rule, block, id(reduction.rule) not in masked)
        for reduction in reductions
    }
    uses = Counter(_logits_key(reduction) for reduction in reductions if reduction.phi == "lse")
    for tile in tiles(score, block, drows, dk, cache):
        shared: dict[Any, Any] = {}  # values of this tile that several reductions use
        grad = torch.zeros_like(tile.scores) if drows else None
        for reduction in reductions:
            rule = rules[id(reduction.rule)]
            if reduction.out is None and (reduction.g is None or grad is None):
                continue
            if reduction.phi == "lse":
                _add_lse(tile, reduction, rule, shared, uses[_logits_key(reduction)] > 1, grad)
            elif rule.listed is None:
                _add_sum(AllPairs(tile), reduction, _tile_mask(tile, rule, shared), grad)
            else:
                _add_sum(_listed_pairs(tile, rule, shared), reduction, None, grad)
        if grad is not None:
            tile.pull(grad)


def specialize(score: Score, block: KeyBlock) -> Score:
    """Return the form of a score that this back end computes, for keys of this shape and dtype."""
    return score


def update_top_k(
    score: Score, block: KeyBlock, rule: Rule, top_scores: Tensor, top_indices: Tensor
) -> None:
    """Merge one block of keys into each query's top k, in place.

    Args:
        score: Similarity function over M queries.
        block: Keys; `block.offset` is the global index of the first.
        rule: Masks select eligible pairs; log-weights are ignored.
        top_scores: [M, k] float32 or float64, descending; -inf if empty.
        top_indices: int64 [M, k] global key indices; -1 if empty.
    """
    for tile in tiles(score, block):
        mask, _ = combine_clauses(rule, tile.rows, tile.keys, tile.scores)
        if mask is not None:
            tile.scores.masked_fill_(~mask, -torch.inf)
        indices = torch.arange(len(tile.keys.keys), device=top_indices.device) + tile.keys.offset
        # A masked key may reach an unfilled slot; its index must not leak.
        indices = torch.where(tile.scores == -torch.inf, -1, indices)
        merge_top_k(top_scores[tile.rows], top_indices[tile.rows], tile.scores, indices)


def merge_top_k(top_scores: Tensor, top_indices: Tensor, scores: Tensor, indices: Tensor) -> None:
    """Merge candidates [m, c] into the top k, `top_scores` and `top_indices` [m, k], in place."""
    best, position = torch.cat([top_scores, scores], 1).topk(top_scores.shape[1], 1)
    top_indices.copy_(torch.cat([top_indices, indices], 1).gather(1, position))
    top_scores.copy_(best)


@dataclass(frozen=True)
class Tile:
    """Scores [r, c] of some rows and the keys `columns` of a block.

    `spare` is work space [r, c]. `pull` takes the gradient [r, c] of the scores and adds the
    gradients of the queries and keys.
    """

    rows: slice
    columns: slice
    keys: KeyBlock
    scores: Tensor
    spare: Tensor
    pull: Callable[[Tensor], None]


def tiles(
    score: Score, block: KeyBlock, drows: Sequence[Tensor] = (), dk: Tensor | None = None,
    cache: ScoreCache | None = None,
) -> Iterator[Tile]:  # fmt: skip
    """Yield all tiles of a block's rows and keys; `drows` and `dk` receive `Tile.pull`'s sums."""
    dtype = accumulator_dtype(torch.promote_types(block.keys.dtype, score.operands[0].dtype))
    n, like = len(block.keys), block.slice(slice(0, 0)).to(dtype)
    first, stop, _ = block.rows.indices(len(score.operands[0]))
    if first >= stop or n == 0:
        return
    height, width = score.tile_shape(ROWS, COLUMNS, block)
    height, width = min(height, stop - first), min(width, n)
    buffers = torch.empty(2, height * width, dtype=dtype, device=block.keys.device)
    scratch = score.scratch(height, width, like) if score.needs_scratch else None
    cached = None if cache is None else cache.first_rows(score, block, dtype, height, bool(drows))
    for start in range(first, stop, height):
        rows = slice(start, min(start + height, stop))
        operands = [operand[rows].detach().to(dtype) for operand in score.operands]
        doperands = [operand[rows] for operand in drows]
        for left in range(0, n, width):
            columns = slice(left, min(left + width, n))
            keys, shape = block.slice(columns).to(dtype), (len(operands[0]), columns.stop - left)
            scores, spare = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            stored = cached_tile(cached, first, rows, columns)
            scores = scores if stored is None else stored
            if stored is None or not drows:
                score.tile(operands, keys, scores, scratch)
            dkeys = None if dk is None else dk[columns]
            pull = partial(score.pull, operands, keys, scores, scratch, doperands, dkeys)
            yield Tile(rows, columns, keys, scores, spare, pull)


class AllPairs:
    """All pairs of a tile; values are [r, c]."""

    def __init__(self, tile: Tile) -> None:
        self.tile, self.scores = tile, tile.scores

    def select(self, value: Tensor, on_rows: bool) -> Tensor:
        """Return the tile's part of a scalar, a per-row or a per-key value, ready to broadcast."""
        if value.ndim == 0:
            return value
        return value[self.tile.rows].unsqueeze(1) if on_rows else value[self.tile.columns]

    def add_sums(self, total: Tensor | None, values: Tensor, on_rows: bool) -> None:
        """Add sums along an axis to a vector or, over both axes, to a scalar."""
        if total is None:
            return
        if total.ndim == 0:
            total += values.sum()  # pairwise; a dot product has 100 times its rounding error
        else:
            total[self.tile.rows if on_rows else self.tile.columns] += values.sum(int(on_rows))

    def add_gradient(self, grad: Tensor, values: Tensor) -> None:
        grad += values


class ListedPairs(AllPairs):
    """Some pairs of a tile; values are [p]. `row` and `column` [p] count from the tile's first."""

    def __init__(self, tile: Tile, row: Tensor, column: Tensor) -> None:
        self.tile, self.row, self.column = tile, row, column
        self.scores = tile.scores[row, column]

    def select(self, value: Tensor, on_rows: bool) -> Tensor:
        if value.ndim == 0:
            return value
        return super().select(value, on_rows).flatten()[self.row if on_rows else self.column]

    def add_sums(self, total: Tensor | None, values: Tensor, on_rows: bool) -> None:
        if total is None or total.ndim == 0:
            super().add_sums(total, values, on_rows)
        else:
            t = self.tile
            span, index = (t.rows, self.row) if on_rows else (t.columns, self.column)
            add_rows(total[span], index, values)

    def add_gradient(self, grad: Tensor, values: Tensor) -> None:
        grad[self.row, self.column] += values  # correct because no pair is listed twice


def _add_sum(
    pairs: AllPairs, reduction: Reduction, mask: TileMask | None, grad: Tensor | None
) -> None:
    """Accumulate a sum over pairs and, with `grad`, its gradients."""
    on_rows = reduction.on_rows
    scale = pairs.select(reduction.scale, on_rows)
    x = pairs.scores * scale
    for value, along_rows in ((reduction.shift, on_rows), (reduction.bias, not on_rows)):
        if value is not None:
            x += pairs.select(value, along_rows)
    phi, slope = PHI[reduction.phi]
    if reduction.out is not None:
        values = phi(x)
        pairs.add_sums(reduction.out, mask.multiply(values) if mask else values, on_rows)
    if reduction.g is None or grad is None:
        return
    dx = slope(x).mul_(pairs.select(reduction.g, on_rows))
    if mask:
        mask.multiply(dx)
    pairs.add_sums(reduction.dshift, dx, on_rows)
    pairs.add_sums(reduction.dbias, dx, not on_rows)
    if reduction.dscale is not None:
        pairs.add_sums(reduction.dscale, dx * pairs.scores, on_rows)
    pairs.add_gradient(grad, dx.mul_(scale))


def _add_lse(
    tile: Tile, reduction: Reduction, rule: BlockRule, shared: dict[Any, Any],
    share_logits: bool, grad: Tensor | None,
) -> None:  # fmt: skip
    """Accumulate a log-sum-exp and, with `grad`, its gradients."""
    pairs, axis = AllPairs(tile), int(reduction.on_rows)
    scale = pairs.select(reduction.scale, reduction.on_rows)
    logits = shared.get(_logits_key(reduction))
    if logits is None:
        logits = torch.mul(tile.scores, scale, out=None if share_logits else tile.spare)
        if reduction.bias is not None:
            logits += pairs.select(reduction.bias, not reduction.on_rows)
        if mask := _tile_mask(tile, rule, shared):
            mask.add_to(logits)
        if share_logits:
            shared[_logits_key(reduction)] = logits
    if reduction.out is not None:
        maximum = logits.amax(axis, keepdim=True)
        # Avoid -inf - -inf = NaN in a fully masked row or column.
        maximum.masked_fill_(maximum == -torch.inf, 0)
        mass = torch.sub(logits, maximum, out=tile.spare).mul_(LOG2E).exp2_().sum(axis)
        tile_z = mass.log_() + maximum.squeeze(axis)
        span = tile.rows if reduction.on_rows else tile.columns
        reduction.out[span] = torch.logaddexp(reduction.out[span], tile_z)
    if reduction.g is None or reduction.z is None or grad is None:
        return
    # A row or column whose pairs are all masked has z = -inf and no probabilities.
    z = torch.where(reduction.z == -torch.inf, torch.inf, reduction.z)
    z = pairs.select(z, reduction.on_rows)
    p = torch.sub(logits, z, out=tile.spare).mul_(LOG2E).exp2_()
    p *= pairs.select(reduction.g, reduction.on_rows)
    if scale.ndim or scale.is_cuda:
        grad.addcmul_(p, scale)
    else:  # faster; reading the number needs no synchronization on a CPU
        grad.add_(p, alpha=float(scale))
    pairs.add_sums(reduction.dbias, p, not reduction.on_rows)
    if reduction.dscale is not None:
        pairs.add_sums(reduction.dscale, p.mul_(tile.scores), reduction.on_rows)


def _logits_key(reduction: Reduction) -> Any:
    """Return a dict key that is equal for log-sum-exps of the same logits, over rows or columns."""
    # Without a rule, computing the logits again is cheaper than storing them in a separate tile.
    separate = reduction.bias is not None or reduction.scale.ndim or not reduction.rule
    return id(reduction) if separate else (id(reduction.scale), id(reduction.rule))


def _tile_mask(tile: Tile, rule: BlockRule, shared: dict[Any, Any]) -> TileMask | None:
    """Evaluate a rule on a tile, once for all reductions that share it."""
    if id(rule) not in shared:
        shared[id(rule)] = rule.on_tile(tile.rows, tile.columns, tile.keys, tile.scores)
    mask: TileMask | None = shared[id(rule)]
    return mask


def _listed_pairs(tile: Tile, rule: BlockRule, shared: dict[Any, Any]) -> ListedPairs:
    """Return a rule's listed pairs on a tile, once for all reductions that share the rule."""
    if id(rule) not in shared:
        assert rule.listed is not None
        shared[id(rule)] = ListedPairs(tile, *rule.listed.in_tile(tile.rows, tile.columns))
    pairs: ListedPairs = shared[id(rule)]
    return pairs
