"""The `reference` back end: dense and in float64. The oracle that every other one is tested on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gigabatch.kernels.rules import BoundEq
from gigabatch.kernels.sources import Panel, wide
from gigabatch.kernels.tiled import PanelStats, Term


def panel_stats(
    q: Tensor, panel: Panel, rule: BoundEq, rows: Sequence[bool], scales: Sequence[Tensor]
) -> PanelStats:
    scores, mask, kind = _scores(q, panel), _mask(q, panel, rule), wide(q.dtype)
    axes = [1 if along_rows else 0 for along_rows in rows]
    return PanelStats(
        [(scores * s.double()).logsumexp(a).to(kind) for a, s in zip(axes, scales, strict=True)],
        [(scores * mask).sum(a).to(kind) for a in axes],
        [mask.sum(a) for a in axes],
    )


def panel_grads(
    q: Tensor,
    panel: Panel,
    rule: BoundEq,
    terms: Sequence[Term],
    dq: Tensor,
    dscales: Sequence[Tensor],
) -> Tensor:
    scores, mask = _scores(q, panel), _mask(q, panel, rule)
    grad = torch.zeros_like(scores)
    for term, dscale in zip(terms, dscales, strict=True):
        z, gz, gpositive = (
            v.double().unsqueeze(1)
            if term.along_rows
            else v[panel.offset : panel.offset + len(panel.keys)].double().unsqueeze(0)
            for v in (term.z, term.gz, term.gpositive)
        )
        p = gz * torch.exp(term.scale.double() * scores - z)
        dscale += (p * scores).sum().to(dscale.dtype)
        grad += term.scale.double() * p + mask * gpositive
    dq += (grad @ panel.keys.double()).to(dq.dtype)
    return (grad.T @ q.detach().double()).to(dq.dtype)


def _scores(q: Tensor, panel: Panel) -> Tensor:
    return q.detach().double() @ panel.keys.double().T


def _mask(q: Tensor, panel: Panel, rule: BoundEq) -> Tensor:
    mask = torch.zeros(len(q), len(panel.keys), dtype=torch.bool, device=q.device)
    mask[rule.pairs(0, len(q))] = True
    return mask
