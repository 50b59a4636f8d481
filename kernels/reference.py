"""Back end `reference`: dense, in float64, with gradients by autograd. The other back ends are
tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gigabatch.kernels.cache import ScoreCache
from gigabatch.kernels.rules import combine_clauses
from gigabatch.kernels.scores import Score
from gigabatch.kernels.sources import ALL_ROWS, KeyBlock
from gigabatch.kernels.tiled import PHI, Reduction, specialize, update_top_k

__all__ = ["DTYPE", "specialize", "sweep", "update_top_k"]
DTYPE = torch.float64  # of logits, sums and gradients, for inputs of any dtype


def sweep(
    score: Score, block: KeyBlock, reductions: Sequence[Reduction],
    drows: Sequence[Tensor] = (), dk: Tensor | None = None, cache: ScoreCache | None = None,
) -> None:  # fmt: skip
    """Accumulate all reductions over one key block; with `drows`, also gradients.

    Arguments are those of `tiled.sweep`; the cache is not used.
    """
    with torch.set_grad_enabled(bool(drows)):
        operands = [_leaf(operand[block.rows]) for operand in score.operands]
        keys = _leaf(block.keys)
        scores = score.dense(operands, replace(block, keys=keys))
        total = 0 * scores.sum()
        gradients: list[tuple[Tensor | None, Tensor | None]] = [(dk, keys)]
        gradients += [(drow[block.rows], leaf) for drow, leaf in zip(drows, operands, strict=False)]
        for reduction in reductions:
            r = reduction
            leaves = [None if v is None else _leaf(v) for v in (r.scale, r.shift, r.bias)]
            gradients += zip((r.dscale, r.dshift, r.dbias), leaves, strict=True)
            total = total + _reduce(reduction, block, scores, leaves)
    if drows:
        needed = [(sink, leaf) for sink, leaf in gradients if sink is not None and leaf is not None]
        grads = torch.autograd.grad(total, [leaf for _, leaf in needed], allow_unused=True)
        for (sink, _), grad in zip(needed, grads, strict=True):
            sink += 0 if grad is None else grad.to(sink.dtype)


def _reduce(
    reduction: Reduction, block: KeyBlock, scores: Tensor, leaves: Sequence[Tensor | None]
) -> Tensor:
    """Add the results to `out`; return a scalar with the gradient of the results times `g`."""
    axis, span = (1, block.rows) if reduction.on_rows else (0, ALL_ROWS)

    def select(value: Tensor, along: bool = True) -> Tensor:
        value = value.double()
        on_rows = value.ndim and reduction.on_rows == along
        return value[block.rows].unsqueeze(1) if on_rows else value

    scale, shift, bias = leaves
    assert scale is not None
    x = select(scale) * scores
    x = x if shift is None else x + select(shift)
    x = x if bias is None else x + select(bias, along=False)
    mask, weights = combine_clauses(reduction.rule, block.rows, block, scores.detach())
    g = torch.zeros(()) if reduction.g is None else select(reduction.g)
    out = reduction.out
    if reduction.phi == "lse":
        x = x if weights is None else x + weights
        x = x if mask is None else x.masked_fill(~mask, -torch.inf)
        if out is not None:
            merged = torch.logaddexp(out[span].double(), x.detach().logsumexp(axis))
            out[span] = merged.to(out.dtype)
        if reduction.z is None:
            return 0 * scores.sum()
        # With z held fixed, sum g exp(x - z) has the gradient of sum g z.
        z = select(reduction.z)
        return (g * torch.exp(x - torch.where(z == -torch.inf, torch.inf, z))).sum()
    weight = torch.ones_like(scores.detach()) if weights is None else weights.double().exp()
    weight = weight if mask is None else weight * mask
    values = torch.where(weight > 0, PHI[reduction.phi][0](x) * weight, 0)
    if out is not None:
        out[span] += values.detach().sum(axis).to(out.dtype)
    return (g * values).sum()


def _leaf(value: Tensor) -> Tensor:
    return value.detach().double().requires_grad_(torch.is_grad_enabled())
