"""The `tiled` back end: plain torch on any device, one tile of scores in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.kernels.rules import BoundEq
from gigabatch.kernels.sources import Panel, wide

ROWS, COLUMNS = 512, 4096  # a tile of 8 MiB in float32: it stays in cache between its uses


@dataclass(frozen=True)
class PanelStats:
    """Statistics over one panel: row entries [M], column entries [m]."""

    z: list[Tensor]
    positive: list[Tensor]
    count: list[Tensor]


@dataclass(frozen=True)
class Term:
    """One log-sum-exp in the backward pass, with the gradients of its results.

    `z`, `gz`, `gpositive`: [M] where `along_rows`, else for all keys [N].
    """

    along_rows: bool
    scale: Tensor
    z: Tensor
    gz: Tensor
    gpositive: Tensor


def panel_stats(
    q: Tensor, panel: Panel, rule: BoundEq, rows: Sequence[bool], scales: Sequence[Tensor]
) -> PanelStats:
    """Forward over one panel: for each log-sum-exp (`rows[i]`: along rows) its partial results."""
    m, n, kind = len(q), len(panel.keys), wide(q.dtype)
    lengths = [m if along_rows else n for along_rows in rows]
    z = [torch.full((size,), -torch.inf, dtype=kind, device=q.device) for size in lengths]
    positive = [torch.zeros(size, dtype=kind, device=q.device) for size in lengths]
    count = [torch.zeros(size, dtype=torch.int64, device=q.device) for size in lengths]
    for tile in _tiles(q, panel, rule):
        for i, along_rows in enumerate(rows):
            span, index = (tile.rows, tile.row) if along_rows else (tile.columns, tile.column)
            part = _tile_lse(tile, along_rows, scales[i])
            z[i][span] = torch.logaddexp(z[i][span], part)
            positive[i][span].index_add_(0, index, tile.positive_scores())
            count[i][span].index_add_(0, index, torch.ones_like(index))
    return PanelStats(z, positive, count)


def panel_grads(
    q: Tensor,
    panel: Panel,
    rule: BoundEq,
    terms: Sequence[Term],
    dq: Tensor,
    dscales: Sequence[Tensor],
) -> Tensor:
    """Backward over one panel: adds to `dq` [M, D] and `dscales`, returns dk [m, D]."""
    dk = torch.zeros(panel.keys.shape, dtype=dq.dtype, device=dq.device)
    for tile in _tiles(q, panel, rule):
        grad = torch.zeros_like(tile.scores)
        for term, dscale in zip(terms, dscales, strict=True):
            z, gz, gpositive = (
                _along(tile, panel, term, v) for v in (term.z, term.gz, term.gpositive)
            )
            scale = float(term.scale)
            # A row or column whose pairs are all masked has z = -inf and no probabilities.
            shift = torch.where(z == -torch.inf, torch.inf, z)
            p = torch.add(-shift, tile.scores, alpha=scale, out=tile.spare).exp_().mul_(gz)
            grad.add_(p, alpha=scale)
            dscale += p.mul_(tile.scores).sum()  # pairwise: a dot product rounds 100 times worse
            index = tile.row if term.along_rows else tile.column
            grad.index_put_((tile.row, tile.column), gpositive.flatten()[index], accumulate=True)
        dq[tile.rows].addmm_(grad, tile.k)
        dk[tile.columns].addmm_(grad.T, tile.q)
    return dk


@dataclass(frozen=True)
class _Tile:
    """Scores [r, c] of `rows` x `columns`, their operands, and the positive pairs inside."""

    rows: slice
    columns: slice
    q: Tensor
    k: Tensor
    scores: Tensor
    spare: Tensor  # scratch of the same shape
    row: Tensor  # of each positive pair, from the tile's first row
    column: Tensor

    def positive_scores(self) -> Tensor:
        return self.scores[self.row, self.column]


def _tiles(q: Tensor, panel: Panel, rule: BoundEq) -> Iterator[_Tile]:
    kind, n = wide(q.dtype), len(panel.keys)
    buffers = torch.empty(2, min(ROWS, len(q)) * min(COLUMNS, n), dtype=kind, device=q.device)
    for top in range(0, len(q), ROWS):
        rows = slice(top, min(top + ROWS, len(q)))
        q_rows = q[rows].detach().to(kind)
        pair_row, pair_key = rule.pairs(rows.start, rows.stop)
        for left in range(0, n, COLUMNS):
            columns = slice(left, min(left + COLUMNS, n))
            k_rows = panel.keys[columns].to(kind)
            shape = (len(q_rows), len(k_rows))
            scores, spare = (b[: shape[0] * shape[1]].view(shape) for b in buffers)
            torch.mm(q_rows, k_rows.T, out=scores)
            inside = (pair_key >= columns.start) & (pair_key < columns.stop)
            yield _Tile(
                rows, columns, q_rows, k_rows, scores, spare,
                pair_row[inside], pair_key[inside] - left,
            )  # fmt: skip


def _tile_lse(tile: _Tile, along_rows: bool, scale: Tensor) -> Tensor:
    axis = 1 if along_rows else 0
    top = tile.scores.amax(axis, keepdim=True) * scale
    p = torch.add(-top, tile.scores, alpha=float(scale), out=tile.spare).exp_()
    return p.sum(axis).log_() + top.squeeze(axis)


def _along(tile: _Tile, panel: Panel, term: Term, value: Tensor) -> Tensor:
    """The entries of a per-row or per-key quantity that belong to a tile, ready to broadcast."""
    if term.along_rows:
        return value[tile.rows].unsqueeze(1)
    start = panel.offset + tile.columns.start
    return value[start : panel.offset + tile.columns.stop].unsqueeze(0)
