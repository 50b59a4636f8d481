"""`lse_stats`: log-sum-exps along rows and columns, and sums of positive scores, of one score pass.

With s_ij = <q_i, k_j>, for each `Lse`:

    rows:     Z_i = log sum_j exp(scale * s_ij)         columns:  Z_j = log sum_i exp(scale * s_ij)

and, for one rule that names the positive pairs P, along the same axis:

    positive_i = sum_{j in P_i} s_ij,   count_i = |P_i|.

The backward pass forms, a tile at a time, the gradient of everything at once,

    G_ij = sum_lse gZ * scale * exp(scale * s_ij - Z) + [ij in P] * gpositive,

and from it dQ = G K and dK = G^T Q: four matrix passes in all (S; S again; dQ; dK).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigabatch.kernels import reference, tiled
from gigabatch.kernels.rules import Eq
from gigabatch.kernels.sources import KeySource, wide

BACKENDS = {"reference": reference, "tiled": tiled}


@dataclass(frozen=True)
class Lse:
    """One log-sum-exp. `axis`: "rows" gives one a query, "columns" one a key.

    `scale`: positive 0-dimensional tensor (differentiable); multiplies the score.
    """

    axis: Literal["rows", "columns"]
    scale: Tensor


@dataclass(frozen=True)
class Stats:
    """For each `Lse` asked for: `z`, and along its axis `positive` sums and `count`.

    Each is [n]: this rank's rows, or for columns this rank's keys. `z` and `positive` are at least
    float32, `count` is int64 and has no gradient.
    """

    z: tuple[Tensor, ...]
    positive: tuple[Tensor, ...]
    count: tuple[Tensor, ...]


def lse_stats(
    q: Tensor, keys: KeySource, lses: Sequence[Lse], positives: Eq, backend: str | None = None
) -> Stats:
    """Log-sum-exps and positive sums of the scores of `q` [n, D] against all keys of a source.

    `backend`: "tiled" (plain torch, the default), or "reference" (dense, float64; the oracle).
    Differentiable once, in q, the source's keys and the scales. Memory O(n + N) beside the keys.
    Under a process group the *sum over ranks* of a function of the results is what is
    differentiated. Raises ValueError for an unknown back end.
    """
    if (backend or "tiled") not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(sorted(BACKENDS))}")
    spec = _Spec(keys, tuple(lse.axis for lse in lses), positives, backend or "tiled")
    out = _LseStats.apply(spec, q, keys.k, *(lse.scale for lse in lses))
    n = len(lses)
    return Stats(out[:n], out[n : 2 * n], out[2 * n :])


@dataclass(frozen=True)
class _Spec:
    keys: KeySource
    axes: tuple[str, ...]
    positives: Eq
    backend: str


class _LseStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: _Spec, q: Tensor, k: Tensor, *scales: Tensor) -> tuple[Tensor, ...]:
        source, engine = spec.keys, BACKENDS[spec.backend]
        rows = [axis == "rows" for axis in spec.axes]
        z, positive, count = [], [], []
        panels = [
            engine.panel_stats(q, p, p_rule, rows, scales)
            for p in source.panels()
            for p_rule in [spec.positives.bind(p)]
        ]
        for i, along_rows in enumerate(rows):
            if along_rows:
                z.append(torch.stack([p.z[i] for p in panels]).logsumexp(0))
                positive.append(sum(p.positive[i] for p in panels))
                count.append(sum(p.count[i] for p in panels))
            else:
                z.append(source.merge_lse(torch.cat([p.z[i] for p in panels])))
                positive.append(source.merge_sum(torch.cat([p.positive[i] for p in panels])))
                count.append(source.merge_sum(torch.cat([p.count[i] for p in panels])))
        ctx.save_for_backward(q, *scales, *z)
        ctx.spec = spec
        ctx.mark_non_differentiable(*count)
        return (*z, *positive, *count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        spec: _Spec = ctx.spec
        source, engine, n = spec.keys, BACKENDS[spec.backend], len(spec.axes)
        q, scales, z = (
            ctx.saved_tensors[0],
            ctx.saved_tensors[1 : n + 1],
            ctx.saved_tensors[n + 1 :],
        )
        terms = []
        for i, axis in enumerate(spec.axes):
            values = [z[i], grads[i], grads[n + i]]
            if axis == "columns":
                values = [source.spread(value.contiguous()) for value in values]
            terms.append(tiled.Term(axis == "rows", scales[i], *values))
        dq = torch.zeros(q.shape, dtype=wide(q.dtype), device=q.device)
        total = source.begin_grad()
        dscales = [torch.zeros_like(scale) for scale in scales]
        for panel in source.panels():
            rule = spec.positives.bind(panel)
            dk = engine.panel_grads(q, panel, rule, terms, dq, dscales)
            source.accept_grad(total, panel, dk)
        dk = source.end_grad(total)
        return (None, dq.to(q.dtype), dk.to(source.k.dtype), *dscales)
