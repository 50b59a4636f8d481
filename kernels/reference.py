"""The `reference` back end: dense, in float64, gradients by autograd. The oracle of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gigabatch.kernels.cache import ScoreCache
from gigabatch.kernels.rules import blend
from gigabatch.kernels.scores import Score
from gigabatch.kernels.sources import ALL, Panel
from gigabatch.kernels.tiled import PHI, Part, fit, top

__all__ = ["KIND", "fit", "sweep", "top"]
KIND = torch.float64  # of everything, whatever the inputs


def sweep(
    score: Score, panel: Panel, parts: Sequence[Part],
    drows: Sequence[Tensor] = (), dk: Tensor | None = None, cache: ScoreCache | None = None,
) -> None:  # fmt: skip
    """See `tiled.sweep`. With Z held fixed, sum g exp(x - Z) has the gradient of sum g Z."""
    with torch.set_grad_enabled(bool(drows)):
        leaves = [_leaf(operand[panel.rows]) for operand in score.operands]
        keys = _leaf(panel.keys)
        scores = score.dense(leaves, replace(panel, keys=keys))
        total = 0 * scores.sum()
        wanted: list[tuple[Tensor | None, Tensor | None]] = [(dk, keys)]
        wanted += [(drow[panel.rows], leaf) for drow, leaf in zip(drows, leaves, strict=False)]
        for part in parts:
            given = [None if v is None else _leaf(v) for v in (part.scale, part.shift, part.bias)]
            wanted += zip((part.dscale, part.dshift, part.dbias), given, strict=True)
            total = total + _term(part, panel, scores, given)
    if drows:
        asked = [(into, leaf) for into, leaf in wanted if into is not None and leaf is not None]
        found = torch.autograd.grad(total, [leaf for _, leaf in asked], allow_unused=True)
        for (into, _), grad in zip(asked, found, strict=True):
            into += 0 if grad is None else grad.to(into.dtype)


def _term(part: Part, panel: Panel, scores: Tensor, given: Sequence[Tensor | None]) -> Tensor:
    """Adds to the part's `out`; returns what has the gradient of its results times `g`."""
    axis, span = (1, panel.rows) if part.on_rows else (0, ALL)

    def cut(value: Tensor, along: bool = True) -> Tensor:
        value = value.double()
        on_rows = value.ndim and part.on_rows == along
        return value[panel.rows].unsqueeze(1) if on_rows else value

    scale, shift, bias = given
    assert scale is not None
    x = cut(scale) * scores
    x = x if shift is None else x + cut(shift)
    x = x if bias is None else x + cut(bias, along=False)
    mask, weights = blend(part.rule, panel.rows, panel, scores.detach())
    g = torch.zeros(()) if part.g is None else cut(part.g)
    if part.phi == "lse":
        x = x if weights is None else x + weights
        x = x if mask is None else x.masked_fill(~mask, -torch.inf)
        if part.out is not None:
            both = torch.logaddexp(part.out[span].double(), x.detach().logsumexp(axis))
            part.out[span] = both.to(part.out.dtype)
        if part.z is None:
            return 0 * scores.sum()
        z = cut(part.z)
        return (g * torch.exp(x - torch.where(z == -torch.inf, torch.inf, z))).sum()
    weight = torch.ones_like(scores.detach()) if weights is None else weights.double().exp()
    weight = weight if mask is None else weight * mask
    values = torch.where(weight > 0, PHI[part.phi][0](x) * weight, 0)
    if part.out is not None:
        part.out[span] += values.detach().sum(axis).to(part.out.dtype)
    return (g * values).sum()


def _leaf(value: Tensor) -> Tensor:
    return value.detach().double().requires_grad_(torch.is_grad_enabled())
