"""The `tiled` back end: plain torch on any device, one tile of scores in memory at a time."""

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

from gigabatch.kernels.cache import ScoreCache, block_of
from gigabatch.kernels.rules import Rule, blend
from gigabatch.kernels.scores import Score
from gigabatch.kernels.sources import Panel, add_rows, wide
from gigabatch.kernels.tile_mask import OnPanel, TileMask

ROWS, COLUMNS = 512, 4096  # a tile of 8 MiB in float32: it stays in cache between its uses
# exp2 of the scaled difference instead of exp: on a CPU exp takes 25 times as long where its result
# is subnormal, as most are late in training. Logits and z stay natural: a z that was rounded in
# another base would put noise on every probability of 1.
LOG2E = math.log2(math.e)

# Functions of a logit and their slopes, which may overwrite it. Beyond 40, log(1 + exp x) is x in
# either precision.
PHI: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softplus": (lambda x: F.softplus(x, threshold=40), torch.sigmoid_),
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "step": (lambda x: (~(x < 0)).to(x.dtype), torch.zeros_like),  # NaN counts
    "linear": (lambda x: x, torch.ones_like),
    "one": (torch.ones_like, torch.zeros_like),
}


@dataclass(frozen=True)
class Part:
    """A term: with logits x_ij = scale_i s_ij + shift_i + bias_j and weights w_ij of its rule,

        phi "lse": log sum_j w_ij exp(x_ij)        else: sum_j w_ij phi(x_ij)

    (i the row where `on_rows`, else the key). Along its axis vectors have [M] or the panel's [m]
    entries; `bias` lies across it. `out` is added to, if given; with `g`, the gradient of the
    results (and `z`, an lse's own), `dscale`, `dshift`, `dbias` are, where they are asked for.
    """

    on_rows: bool
    phi: str
    rule: Rule
    scale: Tensor
    shift: Tensor | None = None
    bias: Tensor | None = None
    z: Tensor | None = None  # results of an lse, for its gradient
    g: Tensor | None = None
    out: Tensor | None = None
    dscale: Tensor | None = None
    dshift: Tensor | None = None
    dbias: Tensor | None = None


def sweep(
    score: Score, panel: Panel, parts: Sequence[Part],
    drows: Sequence[Tensor] = (), dk: Tensor | None = None, cache: ScoreCache | None = None,
) -> None:  # fmt: skip
    """Results of all terms over one panel and, with `drows`, gradients: adds to `out` and the
    gradients of the parts, to `drows` of the operands and, if they learn, `dk` of the panel's keys.
    `cache`: keeps scores of a pass without gradients for the next, with them."""
    masked = {id(part.rule) for part in parts if part.phi != "lse"}
    rules = {
        id(part.rule): OnPanel(part.rule, panel, id(part.rule) not in masked) for part in parts
    }
    alike = Counter(_logits_of(part) for part in parts if part.phi == "lse")
    for tile in tiles(score, panel, drows, dk, cache):
        seen: dict[Any, Any] = {}  # what several terms use
        grad = torch.zeros_like(tile.scores) if drows else None
        for part in parts:
            rule = rules[id(part.rule)]
            if part.out is None and (part.g is None or grad is None):
                continue
            if part.phi == "lse":
                _lse(tile, part, rule, seen, alike[_logits_of(part)] > 1, grad)
            elif rule.alone is None:
                _phi(Block(tile), part, _weighing(tile, rule, seen), grad)
            else:
                _phi(_pairs(tile, rule, seen), part, None, grad)
        if grad is not None:
            tile.pull(grad)


def fit(score: Score, panel: Panel) -> Score:
    """The form of a score that this back end works with, for such keys."""
    return score


def top(score: Score, panel: Panel, rule: Rule, values: Tensor, index: Tensor) -> None:
    """Merge the best keys of one panel into `values` and `index` [M, k], descending."""
    for tile in tiles(score, panel):
        mask, _ = blend(rule, tile.rows, tile.keys, tile.scores)
        if mask is not None:
            tile.scores.masked_fill_(~mask, -torch.inf)
        number = torch.arange(len(tile.keys.keys), device=index.device) + tile.keys.offset
        number = torch.where(tile.scores == -torch.inf, -1, number)
        merge_top(values[tile.rows], index[tile.rows], tile.scores, number)


def merge_top(values: Tensor, index: Tensor, scores: Tensor, numbers: Tensor) -> None:
    """Keep the best of both in `values` and `index` [m, k]."""
    best, at = torch.cat([values, scores], 1).topk(values.shape[1], 1)
    index.copy_(torch.cat([index, numbers], 1).gather(1, at))
    values.copy_(best)


@dataclass(frozen=True)
class Tile:
    """Scores [r, c] of `rows` and the keys `columns` of a panel; `spare`: work space [r, c]."""

    rows: slice
    columns: slice
    keys: Panel
    scores: Tensor
    spare: Tensor
    pull: Callable[[Tensor], None]  # takes a gradient [r, c] of the scores to queries and keys


def tiles(
    score: Score, panel: Panel, drows: Sequence[Tensor] = (), dk: Tensor | None = None,
    cache: ScoreCache | None = None,
) -> Iterator[Tile]:  # fmt: skip
    """All tiles of the scores of a panel's rows; with gradients `drows` and `dk` to pull into."""
    kind = wide(torch.promote_types(panel.keys.dtype, score.operands[0].dtype))
    n, like = len(panel.keys), panel.cut(slice(0, 0)).to(kind)
    first, stop, _ = panel.rows.indices(len(score.operands[0]))
    if first >= stop or n == 0:
        return
    height, width = score.tile_shape(ROWS, COLUMNS, panel)
    height, width = min(height, stop - first), min(width, n)
    buffers = torch.empty(2, height * width, dtype=kind, device=panel.keys.device)
    scratch = score.scratch(height, width, like) if score.needs_scratch else None
    kept = None if cache is None else cache.rows(score, panel, kind, height, bool(drows))
    for start in range(first, stop, height):
        rows = slice(start, min(start + height, stop))
        blocks = [operand[rows].detach().to(kind) for operand in score.operands]
        dblocks = [operand[rows] for operand in drows]
        for left in range(0, n, width):
            columns = slice(left, min(left + width, n))
            keys, shape = panel.cut(columns).to(kind), (len(blocks[0]), columns.stop - left)
            scores, spare = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            store = block_of(kept, first, rows, columns)
            scores = scores if store is None else store
            if store is None or not drows:
                score.tile(blocks, keys, scores, scratch)
            into = None if dk is None else dk[columns]
            pull = partial(score.pull, blocks, keys, scores, scratch, dblocks, into)
            yield Tile(rows, columns, keys, scores, spare, pull)


class Block:
    """All pairs of a tile: values [r, c]."""

    def __init__(self, tile: Tile) -> None:
        self.tile, self.scores = tile, tile.scores

    def cut(self, value: Tensor, on_rows: bool) -> Tensor:
        """The tile's part of something per row or per key, or a scalar, ready to broadcast."""
        if value.ndim == 0:
            return value
        return value[self.tile.rows].unsqueeze(1) if on_rows else value[self.tile.columns]

    def add(self, total: Tensor | None, values: Tensor, on_rows: bool) -> None:
        """Add sums along an axis to a vector or, over both axes, to a scalar."""
        if total is None:
            return
        if total.ndim == 0:
            total += values.sum()  # pairwise: a dot product rounds 100 times worse
        else:
            total[self.tile.rows if on_rows else self.tile.columns] += values.sum(int(on_rows))

    def give(self, grad: Tensor, values: Tensor) -> None:
        grad += values


class Pairs(Block):
    """Some pairs of a tile: values [number of pairs]; `row`, `column` [same] from its first."""

    def __init__(self, tile: Tile, row: Tensor, column: Tensor) -> None:
        self.tile, self.row, self.column = tile, row, column
        self.scores = tile.scores[row, column]

    def cut(self, value: Tensor, on_rows: bool) -> Tensor:
        if value.ndim == 0:
            return value
        return super().cut(value, on_rows).flatten()[self.row if on_rows else self.column]

    def add(self, total: Tensor | None, values: Tensor, on_rows: bool) -> None:
        if total is None or total.ndim == 0:
            super().add(total, values, on_rows)
        else:
            span, at = (self.tile.rows, self.row) if on_rows else (self.tile.columns, self.column)
            add_rows(total[span], at, values)

    def give(self, grad: Tensor, values: Tensor) -> None:
        grad[self.row, self.column] += values  # each pair once


def _phi(view: Block, part: Part, weighing: TileMask | None, grad: Tensor | None) -> None:
    scale = view.cut(part.scale, part.on_rows)
    x = view.scores * scale
    for value, on_rows in ((part.shift, part.on_rows), (part.bias, not part.on_rows)):
        if value is not None:
            x += view.cut(value, on_rows)
    phi, slope = PHI[part.phi]
    if part.out is not None:
        values = phi(x)
        view.add(part.out, weighing.multiply(values) if weighing else values, part.on_rows)
    if part.g is None or grad is None:
        return
    dx = slope(x).mul_(view.cut(part.g, part.on_rows))
    if weighing:
        weighing.multiply(dx)
    view.add(part.dshift, dx, part.on_rows)
    view.add(part.dbias, dx, not part.on_rows)
    if part.dscale is not None:
        view.add(part.dscale, dx * view.scores, part.on_rows)
    view.give(grad, dx.mul_(scale))


def _lse(
    tile: Tile, part: Part, rule: OnPanel, seen: dict[Any, Any], shared: bool, grad: Tensor | None
) -> None:
    view, axis = Block(tile), int(part.on_rows)
    scale = view.cut(part.scale, part.on_rows)
    logits = seen.get(_logits_of(part))
    if logits is None:
        logits = torch.mul(tile.scores, scale, out=None if shared else tile.spare)
        if part.bias is not None:
            logits += view.cut(part.bias, not part.on_rows)
        if weighing := _weighing(tile, rule, seen):
            weighing.add_to(logits)
        if shared:
            seen[_logits_of(part)] = logits
    if part.out is not None:
        most = logits.amax(axis, keepdim=True)
        most.masked_fill_(most == -torch.inf, 0)  # all masked: the sum is 0, its log -inf
        mass = torch.sub(logits, most, out=tile.spare).mul_(LOG2E).exp2_().sum(axis)
        part_z = mass.log_() + most.squeeze(axis)
        span = tile.rows if part.on_rows else tile.columns
        part.out[span] = torch.logaddexp(part.out[span], part_z)
    if part.g is None or part.z is None or grad is None:
        return
    # A row or column whose pairs are all masked has z = -inf and no probabilities.
    z = view.cut(torch.where(part.z == -torch.inf, torch.inf, part.z), part.on_rows)
    p = torch.sub(logits, z, out=tile.spare).mul_(LOG2E).exp2_()
    p *= view.cut(part.g, part.on_rows)
    if scale.ndim or scale.is_cuda:
        grad.addcmul_(p, scale)
    else:  # faster, where reading the number costs nothing
        grad.add_(p, alpha=float(scale))
    view.add(part.dbias, p, not part.on_rows)
    if part.dscale is not None:
        view.add(part.dscale, p.mul_(tile.scores), part.on_rows)


def _logits_of(part: Part) -> Any:
    """The same for log-sum-exps, over rows and over columns, of the same weighted logits. Without
    a rule they are made again sooner than kept in a tile of their own."""
    apart = part.bias is not None or part.scale.ndim or not part.rule
    return id(part) if apart else (id(part.scale), id(part.rule))


def _weighing(tile: Tile, rule: OnPanel, seen: dict[Any, Any]) -> TileMask | None:
    """A rule's weights on a tile, worked out once for all terms that share it."""
    if id(rule) not in seen:
        seen[id(rule)] = rule.on(tile.rows, tile.columns, tile.keys, tile.scores)
    return seen[id(rule)]


def _pairs(tile: Tile, rule: OnPanel, seen: dict[Any, Any]) -> Pairs:
    if id(rule) not in seen:
        assert rule.alone is not None
        seen[id(rule)] = Pairs(tile, *rule.alone.inside(tile.rows, tile.columns))
    return seen[id(rule)]
