"""The `triton` back end: one kernel makes a block of scores and, in its epilogue, everything that a
panel's terms want of it; the gradient's two products are the BLAS's.

A block is reduced to one partial result a row, or a column; partial results are merged in a fixed
order afterwards, so two runs agree to the last bit. No score is ever stored. In the backward pass
the block's gradient G is written in the inputs' dtype, after everything has been taken off it.
Inputs are bf16, fp16 or float32; others, and scores that have no kernel here, go to `tiled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gigabatch.kernels import tiled
from gigabatch.kernels.fused_maxsim import FusedMaxSim
from gigabatch.kernels.maxsim import MaxSim
from gigabatch.kernels.rules import (
    AbsDiff,
    AtLeast,
    Clause,
    Either,
    Eq,
    Ne,
    Rule,
    SecondScore,
    Table,
)
from gigabatch.kernels.scores import Dot, Score
from gigabatch.kernels.sources import Panel
from gigabatch.kernels.tiled import Part

# Scores that are worked on at once: room is taken for their gradient, never for themselves.
PANEL = (8192, 16384)
BLOCK = (128, 128, 64)
INTERPRETED = bool(triton.knobs.runtime.interpret)
INPUTS = ("scale", "shift", "bias", "z", "g")
RESULTS = ("out", "dscale", "dshift", "dbias")


@triton.jit
def _product(a, b, i, j, m, n, d, BD: tl.constexpr, WIDE: tl.constexpr):
    """<a_i, b_j> for rows of a [m, d] and b [n, d], accumulated in float32."""
    sums = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, d, BD):
        at = start + tl.arange(0, BD)
        inside = (at < d)[None, :]
        x = tl.load(a + i[:, None] * d + at[None, :], mask=(i < m)[:, None] & inside, other=0.0)
        y = tl.load(b + j[:, None] * d + at[None, :], mask=(j < n)[:, None] & inside, other=0.0)
        if WIDE:  # the interpreter's product of bf16 is wrong
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        sums = tl.dot(x, tl.trans(y), sums, input_precision="ieee")
    return sums


@triton.jit
def _along(value, i, j, m, n, ON_ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Something per row or per column, or a number, ready to broadcast."""
    if VECTOR:
        if ON_ROWS:
            return tl.load(value + i, mask=i < m, other=0.0)[:, None]
        return tl.load(value + j, mask=j < n, other=0.0)[None, :]
    return tl.load(value)


@triton.jit
def _emit(partial, values, i, j, m, n, ON_ROWS: tl.constexpr):
    """Store a block's sums along one axis, a row for each block of the other axis."""
    if ON_ROWS:
        sums = tl.sum(values, 1)
        tl.store(partial + tl.program_id(1).to(tl.int64) * m + i, sums, mask=i < m)
    else:
        sums = tl.sum(values, 0)
        tl.store(partial + tl.program_id(0).to(tl.int64) * n + j, sums, mask=j < n)


@triton.jit
def _emit_lse(partial, logits, i, j, m, n, ON_ROWS: tl.constexpr):
    """The same for log-sum-exps; over nothing, -inf."""
    if ON_ROWS:
        top = tl.max(logits, 1)
        safe = tl.where(top == float("-inf"), 0.0, top)
        z = tl.log(tl.sum(tl.exp(logits - safe[:, None]), 1)) + safe
        tl.store(partial + tl.program_id(1).to(tl.int64) * m + i, z, mask=i < m)
    else:
        top = tl.max(logits, 0)
        safe = tl.where(top == float("-inf"), 0.0, top)
        z = tl.log(tl.sum(tl.exp(logits - safe[None, :]), 0)) + safe
        tl.store(partial + tl.program_id(0).to(tl.int64) * n + j, z, mask=j < n)


@triton.jit
def _phi(x, PHI: tl.constexpr):
    if PHI == "softplus":
        e = tl.exp(-tl.abs(x))
        return tl.maximum(x, 0.0) + tl.where(e < 1e-4, e - 0.5 * e * e, tl.log(1.0 + e))
    if PHI == "relu":
        return tl.maximum(x, 0.0)
    if PHI == "step":
        return tl.where(x < 0, 0.0, 1.0)
    if PHI == "linear":
        return x
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _slope(x, PHI: tl.constexpr):
    if PHI == "softplus":
        e = tl.exp(-tl.abs(x))
        return tl.where(x < 0, e, 1.0) / (1.0 + e)
    if PHI == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _weigh(scores, i, j, m, n, args, PROGRAM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """A rule's mask and log-weights, see `_program`."""
    whole = (i < m)[:, None] & (j < n)[None, :]
    mask, limit = whole, whole
    joined = whole & (i < 0)[:, None]
    weights = tl.zeros_like(scores)
    for c in tl.static_range(len(PROGRAM)):
        KIND: tl.constexpr = PROGRAM[c][0]
        USE: tl.constexpr = PROGRAM[c][1]
        rows = args[PROGRAM[c][2]]
        keys = args[PROGRAM[c][3]]
        hit, extra = whole, weights
        if KIND == "at least":
            hit = scores >= tl.load(rows + i, mask=i < m, other=0.0)[:, None]
        elif KIND == "second":
            t = _product(rows, keys, i, j, m, n, PROGRAM[c][5], BD, WIDE)
            if USE == "weight":
                extra = t * PROGRAM[c][4]
            else:
                hit = t <= PROGRAM[c][4]
        else:
            a = tl.load(rows + i, mask=i < m, other=0)[:, None]
            b = tl.load(keys + j, mask=j < n, other=0)[None, :]
            if KIND == "eq":
                hit = a == b
            elif KIND == "ne":
                hit = a != b
            elif KIND == "table":
                extra = tl.load(args[PROGRAM[c][5]] + a * PROGRAM[c][4] + b, mask=whole, other=0.0)
            else:
                factor = tl.load(args[PROGRAM[c][5]] + i, mask=i < m, other=0.0)[:, None]
                extra = tl.log(1.0 + factor * tl.abs(a - b))
        if USE == "or":
            joined = joined | hit
        elif USE == "weight":
            weights += tl.where(limit, extra, 0.0)
            limit = whole
        elif USE == "only":
            limit = hit | joined
            joined = whole & (i < 0)[:, None]
        else:
            mask = mask & (hit | joined)
            joined = whole & (i < 0)[:, None]
    return mask, weights


@triton.jit
def _sweep(
    q, k, grad, args, m, n, d, TERMS: tl.constexpr, GRAD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of scores and all terms over it. A term is (phi, along rows, program of its rule,
    and for each of INPUTS and RESULTS its place in `args`, or -1, and whether it is a vector)."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    scores = _product(q, k, i, j, m, n, d, BD, WIDE)
    total = tl.zeros_like(scores)
    for t in tl.static_range(len(TERMS)):
        PHI: tl.constexpr = TERMS[t][0]
        ROWS: tl.constexpr = TERMS[t][1]
        mask, weights = _weigh(scores, i, j, m, n, args, TERMS[t][2], BD, WIDE)
        scale = _along(args[TERMS[t][3][0]], i, j, m, n, ROWS, TERMS[t][3][1])
        x = scores * scale
        if TERMS[t][4][0] >= 0:
            x += _along(args[TERMS[t][4][0]], i, j, m, n, ROWS, TERMS[t][4][1])
        if TERMS[t][5][0] >= 0:
            x += _along(args[TERMS[t][5][0]], i, j, m, n, not ROWS, TERMS[t][5][1])
        slope = total
        if PHI == "lse":
            logits = tl.where(mask, x + weights, float("-inf"))
            if TERMS[t][8][0] >= 0:
                _emit_lse(args[TERMS[t][8][0]], logits, i, j, m, n, ROWS)
            if TERMS[t][7][0] >= 0:
                z = _along(args[TERMS[t][6][0]], i, j, m, n, ROWS, TERMS[t][6][1])
                slope = tl.exp(logits - tl.where(z == float("-inf"), float("inf"), z))
        else:
            weight = tl.where(mask, tl.exp(weights), 0.0)
            if TERMS[t][8][0] >= 0:
                # A masked pair may hold anything: not even 0 times it may enter a sum.
                values = tl.where(mask, _phi(x, PHI), 0.0) * weight
                _emit(args[TERMS[t][8][0]], values, i, j, m, n, ROWS)
            slope = _slope(x, PHI) * weight
        if TERMS[t][7][0] >= 0:
            dx = slope * _along(args[TERMS[t][7][0]], i, j, m, n, ROWS, TERMS[t][7][1])
            if TERMS[t][9][0] >= 0:
                _emit(args[TERMS[t][9][0]], dx * scores, i, j, m, n, ROWS)
            if TERMS[t][10][0] >= 0:
                _emit(args[TERMS[t][10][0]], dx, i, j, m, n, ROWS)
            if TERMS[t][11][0] >= 0:
                _emit(args[TERMS[t][11][0]], dx, i, j, m, n, not ROWS)
            total += dx * scale
    if GRAD:
        inside = (i < m)[:, None] & (j < n)[None, :]
        tl.store(grad + i[:, None] * n + j[None, :], total.to(grad.dtype.element_ty), mask=inside)


def sweep(
    score: Score, panel: Panel, parts: Sequence[Part],
    drows: Sequence[Tensor] = (), dk: Tensor | None = None,
) -> None:  # fmt: skip
    """See `tiled.sweep`."""
    kinds = {panel.keys.dtype, score.operands[0].dtype}
    if not isinstance(score, Dot) or len(kinds) > 1 or torch.float64 in kinds:
        tiled.sweep(fit(score), panel, parts, drows, dk)
        return
    parts = [replace(part, rule=(*part.rule, *panel.only)) for part in parts]
    first, stop, _ = panel.rows.indices(len(score.operands[0]))
    for top in range(first, stop, PANEL[0]):
        rows = slice(top, min(top + PANEL[0], stop))
        q = score.operands[0].detach()[rows].contiguous()
        for left in range(0, len(panel.keys), PANEL[1]):
            columns = slice(left, min(left + PANEL[1], len(panel.keys)))
            keys = panel.cut(columns)
            grad = _panel(q, keys, rows, columns, parts, dk is not None)
            if dk is not None and grad is not None:
                _add_product(drows[0][rows], grad, keys.keys)
                _add_product(dk[columns], grad.T, q)


def fit(score: Score) -> Score:
    """See `tiled.fit`."""
    if isinstance(score, MaxSim) and score.operands[0].dtype != torch.float64:
        return FusedMaxSim(score)
    return score


def _panel(
    q: Tensor, keys: Panel, rows: slice, columns: slice, parts: Sequence[Part], learns: bool
) -> Tensor | None:
    """Launch the kernel on one panel and merge its partial results."""
    k = keys.keys.contiguous()
    (m, d), n = q.shape, len(k)
    block_m, block_n, block_d = BLOCK
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
    args: list[Tensor] = []
    merges: list[tuple[Tensor, slice, Tensor, bool]] = []

    def place(value: Tensor) -> int:
        args.append(value.contiguous())
        return len(args) - 1

    def field(part: Part, name: str) -> tuple[int, bool]:
        value = getattr(part, name)
        if value is None:
            return -1, False
        on_rows = part.on_rows != name.endswith("bias")
        span, size, blocks = (rows, m, grid[1]) if on_rows else (columns, n, grid[0])
        if name in INPUTS:
            return place(value[span] if value.ndim else value), bool(value.ndim)
        partial = q.new_empty(blocks, size, dtype=torch.float32)
        merges.append((value, span, partial, name == "out" and part.phi == "lse"))
        return place(partial), True

    terms = tuple(
        (part.phi, part.on_rows, _program(part.rule, rows, keys, place),
         *(field(part, name) for name in INPUTS + RESULTS))
        for part in parts
    )  # fmt: skip
    grad = q.new_empty(m, n) if learns else None
    _sweep[grid](
        q, k, q if grad is None else grad, tuple(args), m, n, d, terms, learns,
        block_m, block_n, block_d, INTERPRETED,
    )  # fmt: skip
    for total, span, partial, is_lse in merges:
        if is_lse:
            total[span] = torch.logaddexp(total[span], partial.logsumexp(0))
        elif total.ndim == 0:
            total += partial.sum()
        else:
            total[span] += partial.sum(0)
    return grad


def _program(rule: Rule, rows: slice, keys: Panel, place: Any) -> tuple[tuple[Any, ...], ...]:
    """A rule as a flat list of steps, (kind, use, place of the row values, of the key values, a
    number, a place or a width). Use: "and" ends a mask, "or" joins it to the next, "only" limits
    the next log-weight to it, "weight" adds log-weights."""
    steps: list[tuple[Any, ...]] = []

    def add(clause: Clause, use: str) -> None:
        if isinstance(clause, Either):
            add(clause.one, "or")
            add(clause.other, use)
            return
        if isinstance(clause, AtLeast):
            at = place(clause.rows[rows])
            steps.append(("at least", use, at, at, 0, 0))
            return
        assert isinstance(clause, Eq | Table | AbsDiff | SecondScore)
        both = place(clause.rows[rows]), place(keys.metadata[clause.keys])
        if isinstance(clause, Eq):
            steps.append(("ne" if isinstance(clause, Ne) else "eq", use, *both, 0, 0))
        elif isinstance(clause, Table):
            if clause.only is not None:
                add(clause.only, "only")
            steps.append(("table", "weight", *both, clause.table.shape[1], place(clause.table)))
        elif isinstance(clause, AbsDiff):
            one = torch.ones_like(clause.rows)
            factor = one if clause.factor is None else clause.factor
            steps.append(("distance", "weight", *both, 0, place(factor[rows])))
        else:
            soft, width = clause.at_most is None, clause.rows.shape[1]
            number = clause.scale if clause.at_most is None else clause.at_most
            steps.append(("second", "weight" if soft else use, *both, number, width))

    for clause in rule:
        add(clause, "and")
    return tuple(steps)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32 whatever the inputs."""
    if a.is_cuda and a.dtype != torch.float32:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())
