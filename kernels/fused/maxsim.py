"""MaxSim in Triton: one pair of items per program; token products are never stored.

The backward pass recomputes a pair's products and their maxima, and multiplies by the one-hot
matrix of the maxima. One program computes the gradient of one query (or key). It visits all items
of the other side in order, so nothing is added atomically and two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gigabatch.kernels.maxsim import TOKENS, MaxSim
from gigabatch.kernels.sources import KeyBlock

TILE = 1024  # items per side of a tile of scores
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _load_tokens(x, item, t, tokens, d, BD: tl.constexpr, WIDE: tl.constexpr):
    """Load vectors [len(t), BD] of some tokens of an item; 0 beyond its last token."""
    at = tl.arange(0, BD)
    where = x + (item * tokens + t)[:, None].to(tl.int64) * d + at[None, :]
    vectors = tl.load(where, mask=(t < tokens)[:, None] & (at < d)[None, :], other=0.0)
    return vectors.to(tl.float32) if WIDE else vectors


@triton.jit
def _products(q, k, real, j, u, tk):
    """Compute the token products of a pair of items; -inf at the key's padding."""
    products = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    is_real = tl.load(real + j * tk + u, mask=u < tk, other=0)
    return tl.where((is_real != 0)[None, :], products, float("-inf"))


@triton.jit
def _score(
    q, k, real, out, width, tq, tk, d, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    u = tl.arange(0, BK)
    keys = _load_tokens(k, j, u, tk, d, BD, WIDE)
    score = 0.0
    for first in range(0, tq, BQ):
        t = first + tl.arange(0, BQ)
        best = tl.max(_products(_load_tokens(q, i, t, tq, d, BD, WIDE), keys, real, j, u, tk), 1)
        score += tl.sum(tl.where(t < tq, best, 0.0))
    tl.store(out + i * width + j, score)


@triton.jit
def _query_grad(
    q, k, real, grad, dq, n, tq, tk, d, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Store dq_it = sum_j G_ij k_ju, where u is the token that t chose."""
    i = tl.program_id(0).to(tl.int64)
    t, u, at = tl.program_id(1) * BQ + tl.arange(0, BQ), tl.arange(0, BK), tl.arange(0, BD)
    queries = _load_tokens(q, i, t, tq, d, BD, WIDE)
    total = tl.zeros((BQ, BD), tl.float32)
    for j in range(n):
        keys = _load_tokens(k, j, u, tk, d, BD, WIDE)
        chosen = tl.argmax(_products(queries, keys, real, j, u, tk), 1)
        one_hot = (chosen[:, None] == u[None, :]).to(keys.dtype)
        total += tl.dot(one_hot, keys, input_precision="tf32x3") * tl.load(grad + i * n + j)
    where = dq + (i * tq + t)[:, None] * d + at[None, :]
    tl.store(where, total, mask=(t < tq)[:, None] & (at < d)[None, :])


@triton.jit
def _key_grad(
    q, k, real, grad, dk, m, n, tq, tk, d, BQ: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store dk_ju = sum_i G_ij times the sum of the q_it that chose u."""
    j = tl.program_id(0).to(tl.int64)
    u, at = tl.arange(0, BK), tl.arange(0, BD)
    keys = _load_tokens(k, j, u, tk, d, BD, WIDE)
    total = tl.zeros((BK, BD), tl.float32)
    for i in range(m):
        g = tl.load(grad + i * n + j)
        for first in range(0, tq, BQ):
            t = first + tl.arange(0, BQ)
            queries = _load_tokens(q, i, t, tq, d, BD, WIDE)
            chosen = tl.argmax(_products(queries, keys, real, j, u, tk), 1)
            one_hot = ((chosen[:, None] == u[None, :]) & (t < tq)[:, None]).to(queries.dtype)
            total += tl.dot(tl.trans(one_hot), queries, input_precision="tf32x3") * g
    where = dk + (j * tk + u)[:, None] * d + at[None, :]
    tl.store(where, total, mask=(u < tk)[:, None] & (at < d)[None, :])


class FusedMaxSim(MaxSim):
    """`MaxSim` whose tiles are computed by the kernels above."""

    needs_scratch = False

    def __init__(self, score: MaxSim) -> None:
        self.operands, self.tokens = score.operands, score.tokens

    @staticmethod
    def fits(score: MaxSim, keys: Tensor) -> bool:
        """Return whether the kernels can run: all tokens of a key fit on a multiprocessor, and both
        sides share a dtype other than float64."""
        dtypes = {score.operands[0].dtype, keys.dtype}
        small = _block(keys.shape[1]) * _block(keys.shape[2]) <= 128 * 256
        return small and len(dtypes) == 1 and torch.float64 not in dtypes

    def tile_shape(self, rows: int, columns: int, keys: KeyBlock) -> tuple[int, int]:
        return TILE, TILE

    def tile(self, rows: Sequence[Tensor], keys: KeyBlock, out: Tensor, scratch: Any) -> None:
        q, k, real, sizes, options = self._arguments(rows, keys)
        with torch.cuda.device_of(k):
            _score[(len(q), len(k))](q, k, real, out, out.stride(0), *sizes, **options)
        out.mul_(rows[1].unsqueeze(1))

    def pull(
        self, rows: Sequence[Tensor], keys: KeyBlock, scores: Tensor, scratch: Any,
        drows: Sequence[Tensor], dk: Tensor | None, grad: Tensor,
    ) -> None:  # fmt: skip
        q, k, real, sizes, options = self._arguments(rows, keys)
        grad = grad.mul_(rows[1].unsqueeze(1)).contiguous()
        dq_here, dk_here = (torch.empty_like(x, dtype=torch.float32) for x in (q, k))
        with torch.cuda.device_of(k):
            blocks = triton.cdiv(q.shape[1], sizes[3])
            _query_grad[(len(q), blocks)](q, k, real, grad, dq_here, len(k), *sizes, **options)
            if dk is not None:
                _key_grad[(len(k),)](q, k, real, grad, dk_here, len(q), len(k), *sizes, **options)
                dk.add_(dk_here)
        drows[0].add_(dq_here)

    def _arguments(self, rows: Sequence[Tensor], keys: KeyBlock) -> tuple[Any, ...]:
        """Return both sides in the queries' dtype, the mask, and the kernels' sizes and options.

        The cast is exact, because tiles were widened from that dtype.
        """
        dtype, real = self.operands[0].dtype, keys.metadata[TOKENS]
        q, k = rows[0].to(dtype).contiguous(), torch.where(real.unsqueeze(2), keys.keys, 0)
        k = k.to(dtype)
        tq, tk, d = q.shape[1], k.shape[1], q.shape[2]
        bq, bk, bd = _block(tq), _block(tk), _block(d)
        sizes = (tq, tk, d, min(64, bq), bk, bd, INTERPRETED)
        # With one stage, two programs share a multiprocessor, and an item fits on older GPUs.
        options = {"num_warps": 8 if bk * bd > 8192 else 4, "num_stages": 1}
        return q, k.contiguous(), real.to(torch.int8).contiguous(), sizes, options


def _block(size: int) -> int:
    return int(max(16, triton.next_power_of_2(size)))
