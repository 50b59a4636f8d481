"""Triton kernels of the dot score and of gated cosine; `launch.py` calls them.

- `sweep`: one block of S = Q K^T per program, which all reductions process. With LEARNS the
  gradient G of all reductions with respect to S is stored. From it the BLAS computes dQ = G K and
  dK = G^T Q.
- `best`: the K largest scores of each row of a block, after masking.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from gigabatch.kernels.fused.blocks import (
    count,
    emit,
    emit_lse,
    entry,
    exp,
    field,
    nth,
    per_key,
    per_row,
    phi,
    place,
    product,
    slope,
)
from gigabatch.kernels.fused.rules import Step, masks, may_count, weigh, weighs


@dataclass(frozen=True)
class At:
    """A tensor's place among the arguments, and its side: "rows", "keys", or "one" (a scalar)."""

    place: int
    side: str


@dataclass(frozen=True)
class Term:
    """A `tiled.Reduction` as a compile-time constant."""

    phi: str
    on_rows: bool
    scale: At
    shift: At | None
    bias: At | None
    z: At | None
    g: At | None
    out: At | None
    dscale: At | None
    dshift: At | None
    dbias: At | None


@dataclass(frozen=True)
class Group:
    """Terms that share a rule. `sparse`: all are sums over pairs of equal values, 0 without one."""

    rule: tuple[Step, ...]
    terms: tuple[Term, ...] = ()
    sparse: bool = False


@dataclass(frozen=True)
class Common:
    """The scale that all terms share, and its gradient."""

    scale: At
    dscale: At | None


@dataclass(frozen=True)
class Config:
    """Rows, keys and width of a block; its warps and pipeline stages."""

    bm: int
    bn: int
    bd: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Setup(Config):
    """A `Config`, and what else the compiler must know.

    `d` is the vectors' width; `gated`: the score is `GatedCosine`; `wide`: products are float32;
    `full`: every block is full.
    """

    d: int
    gated: bool
    wide: bool
    full: bool


@triton.jit
def fetch(args, i, j, m, n, AT: tl.constexpr):
    """Load a value of a term, ready to broadcast."""
    if field(AT, "side") == "one":
        return tl.load(args[field(AT, "place")])
    elif field(AT, "side") == "rows":
        return per_row(args[field(AT, "place")], i, m)
    else:
        return per_key(args[field(AT, "place")], j, n)


@triton.jit
def deliver(args, values, i, j, m, n, row, column, AT: tl.constexpr):
    """Store a block's part of a result, if it is needed; a scalar is first kept for each row."""
    if AT is not None:
        emit(args[field(AT, "place")], values, i, j, m, n, row, column, field(AT, "side") != "keys")


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
    """Store a term's results; return its gradient for the scores (not SCALED: for the logits)."""
    PHI: tl.constexpr = field(TERM, "phi")
    scale = fetch(args, i, j, m, n, field(TERM, "scale"))
    x = scores * scale
    if field(TERM, "shift") is not None:
        x += fetch(args, i, j, m, n, field(TERM, "shift"))
    if field(TERM, "bias") is not None:
        x += fetch(args, i, j, m, n, field(TERM, "bias"))
    dx = tl.zeros_like(scores)
    if PHI == "lse":
        if WEIGHED:
            x += weights
        if MASKED:
            x = tl.where(mask, x, float("-inf"))
        if field(TERM, "out") is not None:
            emit_lse(args[field(field(TERM, "out"), "place")], x, i, j, m, n, row, column,
                     field(TERM, "on_rows"))  # fmt: skip
        if field(TERM, "g") is not None:
            z = fetch(args, i, j, m, n, field(TERM, "z"))
            dx = exp(x - tl.where(z == float("-inf"), float("inf"), z))
    else:
        if field(TERM, "out") is not None:
            deliver(args, weighted(phi(x, PHI), mask, weights, MASKED, WEIGHED), i, j, m, n, row,
                    column, field(TERM, "out"))  # fmt: skip
        if field(TERM, "g") is not None:
            dx = weighted(slope(x, PHI), mask, weights, MASKED, WEIGHED)
    if field(TERM, "g") is not None:
        dx *= fetch(args, i, j, m, n, field(TERM, "g"))
        deliver(args, dx, i, j, m, n, row, column, field(TERM, "dshift"))
        deliver(args, dx, i, j, m, n, row, column, field(TERM, "dbias"))
        deliver(args, dx * scores, i, j, m, n, row, column, field(TERM, "dscale"))
        if SCALED:
            dx *= scale
    return dx


@triton.jit
def run_group(
    scores, valid, args, i, j, m, n, row, column, GROUP: tl.constexpr, SCALED: tl.constexpr,
    SETUP: tl.constexpr,
):  # fmt: skip
    """Run all terms of one rule; return the sum of their gradients."""
    mask, weights = weigh(scores, valid, args, i, j, m, n, GROUP, field(SETUP, "bd"))
    total = tl.zeros_like(scores)
    for t in tl.static_range(count(GROUP, "terms")):
        total += run_term(scores, mask, weights, args, i, j, m, n, row, column,
                          entry(GROUP, "terms", t), masks(GROUP, field(SETUP, "full")),
                          weighs(GROUP), SCALED)  # fmt: skip
    return total


@triton.jit
def make_block(q, gate, k, kept, m, n, width, KEPT: tl.constexpr, SETUP: tl.constexpr):
    """Return this program's block: row, column, i, j, which pairs exist, scores, and the factor
    <gate_i, k_j^2>^-1/2 of a gated score (see `scores.GatedCosine`).

    KEPT: scores are "stored" to, or "loaded" from, kept [m, >= n], whose rows are `width` apart.
    """
    BM: tl.constexpr = field(SETUP, "bm")
    BN: tl.constexpr = field(SETUP, "bn")
    D: tl.constexpr = field(SETUP, "d")
    BD: tl.constexpr = field(SETUP, "bd")
    row, column = place(m, n, BM, BN)
    i = row * BM + tl.arange(0, BM)
    j = column * BN + tl.arange(0, BN)
    if field(SETUP, "full"):
        valid = tl.full((BM, BN), 1, tl.int1)
    else:
        valid = (i < m)[:, None] & (j < n)[None, :]
    at = i.to(tl.int64)[:, None] * width + j[None, :]
    if KEPT == "loaded":
        scores = tl.load(kept + at, mask=valid, other=0.0)
    else:
        scores = product(q, k, i, j, m, n, D, BD, field(SETUP, "wide"), False)
    inverse = scores
    if field(SETUP, "gated"):
        length = product(gate, k, i, j, m, n, D, BD, True, True)
        inverse = tl.where(length > 1.17549435e-38, tl.rsqrt(length), 0.0)
        scores *= inverse
    if KEPT == "stored":
        tl.store(kept + at, scores, mask=valid)
    return row, column, i, j, valid, scores, inverse


@triton.jit
def sweep(
    q, gate, k, kept, grad, grad_gate, args, m, n, width, GROUPS: tl.constexpr,
    COMMON: tl.constexpr, KEPT: tl.constexpr, LEARNS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    row, column, i, j, valid, scores, inverse = make_block(
        q, gate, k, kept, m, n, width, KEPT, SETUP
    )
    total = tl.zeros_like(scores)
    for g in tl.static_range(len(GROUPS)):
        if field(nth(GROUPS, g), "sparse"):
            if may_count(args, i, j, m, n, nth(GROUPS, g)):  # few blocks hold a positive
                total += run_group(scores, valid, args, i, j, m, n, row, column, nth(GROUPS, g),
                                   COMMON is None, SETUP)  # fmt: skip
        else:
            total += run_group(scores, valid, args, i, j, m, n, row, column, nth(GROUPS, g),
                               COMMON is None, SETUP)  # fmt: skip
    if LEARNS:
        if COMMON is not None:
            deliver(args, total * scores, i, j, m, n, row, column, field(COMMON, "dscale"))
            total *= fetch(args, i, j, m, n, field(COMMON, "scale"))
        at = i[:, None] * n + j[None, :]
        if field(SETUP, "gated"):  # A = <a, k>, B = <g^2, k^2>: dA = G B^-1/2, dB = -G s B^-1 / 2
            total *= inverse
            tl.store(grad_gate + at, -0.5 * total * inverse * scores, mask=valid)
        tl.store(grad + at, total.to(grad.dtype.element_ty), mask=valid)


@triton.jit
def best(
    q, gate, k, values, index, args, m, n, first, RULE: tl.constexpr, K: tl.constexpr,
    SETUP: tl.constexpr,
):  # fmt: skip
    """Store the K best keys of each row of a block, descending: values and index [blocks of keys,
    K, m]. `first` is the global index of the first key; -1 where no more keys are eligible."""
    _, column, i, j, valid, scores, _ = make_block(q, gate, k, q, m, n, n, None, SETUP)
    mask, _ = weigh(scores, valid, args, i, j, m, n, RULE, field(SETUP, "bd"))
    left = tl.where(mask, scores, float("-inf"))
    for t in tl.static_range(K):
        most = tl.max(left, 1)
        at = column * field(SETUP, "bn") + tl.argmax(left, 1)
        left = tl.where(j[None, :] == at[:, None], float("-inf"), left)
        here = (column * K + t) * m + i
        tl.store(values + here, most, mask=i < m)
        tl.store(index + here, tl.where(most == float("-inf"), -1, first + at), mask=i < m)
