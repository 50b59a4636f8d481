"""Triton kernels for the dot product and the gated cosine; `launch.py` calls them.

- `sweep`: all reductions over one block of S = Q K^T per program. With BACKWARD, it stores the
  gradient G of all reductions with respect to S. From it the BLAS computes dQ = G K and dK = G^T Q.
- `best`: the K largest scores of each row of a block, after masking.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from gigabatch.kernels.fused.blocks import (
    block_position,
    count,
    entry,
    exp,
    field,
    nth,
    per_key,
    per_row,
    phi,
    product,
    slope,
    store_lse,
    store_sums,
)
from gigabatch.kernels.fused.rules import Step, evaluate_rule, has_weights, may_count, needs_mask


@dataclass(frozen=True)
class Argument:
    """A tensor argument: its index, and its side "rows", "keys", or "one" (a scalar)."""

    index: int
    side: str


@dataclass(frozen=True)
class Term:
    """A `tiled.Reduction` as a compile-time constant."""

    phi: str
    on_rows: bool
    scale: Argument
    shift: Argument | None
    bias: Argument | None
    z: Argument | None
    g: Argument | None
    out: Argument | None
    dscale: Argument | None
    dshift: Argument | None
    dbias: Argument | None


@dataclass(frozen=True)
class Group:
    """Terms that share a rule. `sparse`: all are sums over pairs of equal values, so that a block
    without such a pair can be skipped."""

    rule: tuple[Step, ...]
    terms: tuple[Term, ...] = ()
    sparse: bool = False


@dataclass(frozen=True)
class SharedScale:
    """The scale that all terms share, and its gradient."""

    scale: Argument
    dscale: Argument | None


@dataclass(frozen=True)
class BlockConfig:
    """Rows, keys and width of a block, and its number of warps and pipeline stages."""

    bm: int
    bn: int
    bd: int
    warps: int
    stages: int


@dataclass(frozen=True)
class KernelOptions(BlockConfig):
    """Block configuration and all other compile-time options of a kernel.

    `d` is the width of the vectors; `gated`: the score is `GatedCosine`; `wide`: products are
    float32; `full`: every block is full.
    """

    d: int
    gated: bool
    wide: bool
    full: bool


@triton.jit
def load_value(args, i, j, m, n, ARGUMENT: tl.constexpr):
    """Load a value of a term, ready to broadcast."""
    if field(ARGUMENT, "side") == "one":
        return tl.load(args[field(ARGUMENT, "index")])
    elif field(ARGUMENT, "side") == "rows":
        return per_row(args[field(ARGUMENT, "index")], i, m)
    else:
        return per_key(args[field(ARGUMENT, "index")], j, n)


@triton.jit
def store_result(args, values, i, j, m, n, row, column, ARGUMENT: tl.constexpr):
    """Store a block's partial sums if the result is needed; those of a scalar are sums per row."""
    if ARGUMENT is not None:
        store_sums(args[field(ARGUMENT, "index")], values, i, j, m, n, row, column,
                   field(ARGUMENT, "side") != "keys")  # fmt: skip


@triton.jit
def weighted(values, mask, weights, MASKED: tl.constexpr, WEIGHED: tl.constexpr):
    """Multiply values by their pairs' weights; a masked pair becomes 0, even if it holds NaN."""
    if WEIGHED:
        values = tl.where(weights > float("-inf"), values * exp(weights), 0.0)
    return tl.where(mask, values, 0.0) if MASKED else values


@triton.jit
def run_term(
    scores, mask, weights, args, i, j, m, n, row, column, TERM: tl.constexpr,
    MASKED: tl.constexpr, WEIGHED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Store a term's results. Returns its gradient for the scores if SCALED, else for logits."""
    PHI: tl.constexpr = field(TERM, "phi")
    scale = load_value(args, i, j, m, n, field(TERM, "scale"))
    x = scores * scale
    if field(TERM, "shift") is not None:
        x += load_value(args, i, j, m, n, field(TERM, "shift"))
    if field(TERM, "bias") is not None:
        x += load_value(args, i, j, m, n, field(TERM, "bias"))
    dx = tl.zeros_like(scores)
    if PHI == "lse":
        if WEIGHED:
            x += weights
        if MASKED:
            x = tl.where(mask, x, float("-inf"))
        if field(TERM, "out") is not None:
            store_lse(args[field(field(TERM, "out"), "index")], x, i, j, m, n, row, column,
                      field(TERM, "on_rows"))  # fmt: skip
        if field(TERM, "g") is not None:
            z = load_value(args, i, j, m, n, field(TERM, "z"))
            dx = exp(x - tl.where(z == float("-inf"), float("inf"), z))
    else:
        if field(TERM, "out") is not None:
            values = weighted(phi(x, PHI), mask, weights, MASKED, WEIGHED)
            store_result(args, values, i, j, m, n, row, column, field(TERM, "out"))
        if field(TERM, "g") is not None:
            dx = weighted(slope(x, PHI), mask, weights, MASKED, WEIGHED)
    if field(TERM, "g") is not None:
        dx *= load_value(args, i, j, m, n, field(TERM, "g"))
        store_result(args, dx, i, j, m, n, row, column, field(TERM, "dshift"))
        store_result(args, dx, i, j, m, n, row, column, field(TERM, "dbias"))
        store_result(args, dx * scores, i, j, m, n, row, column, field(TERM, "dscale"))
        if SCALED:
            dx *= scale
    return dx


@triton.jit
def run_group(
    scores, valid, args, i, j, m, n, row, column, GROUP: tl.constexpr, SCALED: tl.constexpr,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """Run all terms of one rule. Returns the sum of their gradients."""
    mask, weights = evaluate_rule(scores, valid, args, i, j, m, n, GROUP, field(OPTIONS, "bd"))
    total = tl.zeros_like(scores)
    for t in tl.static_range(count(GROUP, "terms")):
        total += run_term(scores, mask, weights, args, i, j, m, n, row, column,
                          entry(GROUP, "terms", t), needs_mask(GROUP, field(OPTIONS, "full")),
                          has_weights(GROUP), SCALED)  # fmt: skip
    return total


@triton.jit
def compute_block(q, gate, k, cached, m, n, width, CACHE: tl.constexpr, OPTIONS: tl.constexpr):
    """Compute this program's block. Returns its row, column, i, j, the mask of pairs that exist,
    scores, and the factor <gate_i, k_j^2>^-1/2 of a gated score (see `scores.GatedCosine`).

    CACHE: scores are "stored" in or "loaded" from `cached` [m, >= n], whose rows are `width` apart.
    """
    BM: tl.constexpr = field(OPTIONS, "bm")
    BN: tl.constexpr = field(OPTIONS, "bn")
    D: tl.constexpr = field(OPTIONS, "d")
    BD: tl.constexpr = field(OPTIONS, "bd")
    row, column = block_position(m, n, BM, BN)
    i = row * BM + tl.arange(0, BM)
    j = column * BN + tl.arange(0, BN)
    if field(OPTIONS, "full"):
        valid = tl.full((BM, BN), 1, tl.int1)
    else:
        valid = (i < m)[:, None] & (j < n)[None, :]
    at = i.to(tl.int64)[:, None] * width + j[None, :]
    if CACHE == "loaded":
        scores = tl.load(cached + at, mask=valid, other=0.0)
    else:
        scores = product(q, k, i, j, m, n, D, BD, field(OPTIONS, "wide"), False)
    inverse = scores
    if field(OPTIONS, "gated"):
        length = product(gate, k, i, j, m, n, D, BD, True, True)
        inverse = tl.where(length > 1.17549435e-38, tl.rsqrt(length), 0.0)
        scores *= inverse
    if CACHE == "stored":
        tl.store(cached + at, scores, mask=valid)
    return row, column, i, j, valid, scores, inverse


@triton.jit
def sweep(
    q, gate, k, cached, grad, grad_gate, args, m, n, width, GROUPS: tl.constexpr,
    SHARED: tl.constexpr, CACHE: tl.constexpr, BACKWARD: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    row, column, i, j, valid, scores, inverse = compute_block(
        q, gate, k, cached, m, n, width, CACHE, OPTIONS
    )
    total = tl.zeros_like(scores)
    for g in tl.static_range(len(GROUPS)):
        if field(nth(GROUPS, g), "sparse"):
            if may_count(args, i, j, m, n, nth(GROUPS, g)):  # few blocks hold an equal pair
                total += run_group(scores, valid, args, i, j, m, n, row, column, nth(GROUPS, g),
                                   SHARED is None, OPTIONS)  # fmt: skip
        else:
            total += run_group(scores, valid, args, i, j, m, n, row, column, nth(GROUPS, g),
                               SHARED is None, OPTIONS)  # fmt: skip
    if BACKWARD:
        if SHARED is not None:
            store_result(args, total * scores, i, j, m, n, row, column, field(SHARED, "dscale"))
            total *= load_value(args, i, j, m, n, field(SHARED, "scale"))
        at = i[:, None] * n + j[None, :]
        if field(OPTIONS, "gated"):  # A = <a, k>, B = <g^2, k^2>: dA = G B^-1/2, dB = -G s B^-1 / 2
            total *= inverse
            tl.store(grad_gate + at, -0.5 * total * inverse * scores, mask=valid)
        tl.store(grad + at, total.to(grad.dtype.element_ty), mask=valid)


@triton.jit
def best(
    q, gate, k, values, index, args, m, n, first, RULE: tl.constexpr, K: tl.constexpr,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """Store the K best keys of each row of a block, descending.

    `values` and `index` are [blocks of keys, K, m]; the index is -1 where no more keys are
    eligible. `first` is the global index of the first key.
    """
    _, column, i, j, valid, scores, _ = compute_block(q, gate, k, q, m, n, n, None, OPTIONS)
    mask, _ = evaluate_rule(scores, valid, args, i, j, m, n, RULE, field(OPTIONS, "bd"))
    remaining = tl.where(mask, scores, float("-inf"))
    for t in tl.static_range(K):
        maximum = tl.max(remaining, 1)
        at = column * field(OPTIONS, "bn") + tl.argmax(remaining, 1)
        remaining = tl.where(j[None, :] == at[:, None], float("-inf"), remaining)
        offsets = (column * K + t) * m + i
        tl.store(values + offsets, maximum, mask=i < m)
        tl.store(index + offsets, tl.where(maximum == float("-inf"), -1, first + at), mask=i < m)
