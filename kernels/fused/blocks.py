"""Operations of Triton kernels on a block [BM, BN] of pairs: products, broadcasts, reductions.

A block is reduced to one partial result for each row or key. The host merges them in a fixed order,
without atomics, so that two runs give the same bits. i [BM] and j [BN] are row and key indices.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
TOGETHER = tl.constexpr(8)  # rows of blocks run together: their keys stay in the L2 cache


# Triton accepts no tuple of records as a compile-time value, so each is reached in one step.
@triton.constexpr_function
def field(record, name):
    return getattr(record, name)


@triton.constexpr_function
def entry(record, name, index):
    return getattr(record, name)[index]


@triton.constexpr_function
def count(record, name):
    return len(getattr(record, name))


@triton.constexpr_function
def nth(records, index):
    return records[index]


@triton.jit
def exp(x):
    """Return e^x through the GPU's exp2; `tl.exp` takes more instructions."""
    return tl.exp2(x * LOG2E)


@triton.jit
def per_row(values, i, m):
    return tl.load(values + i, mask=i < m, other=0)[:, None]


@triton.jit
def per_key(values, j, n):
    return tl.load(values + j, mask=j < n, other=0)[None, :]


@triton.jit
def product(
    a, b, i, j, m, n, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, SQUARE: tl.constexpr
):
    """Return <a_i, b_j>, or <a_i, b_j^2> with SQUARE, for rows of a [m, D] and b [n, D].

    Sums are float32; with WIDE the products are, too. Rows past the last one read the last one: the
    caller masks them.
    """
    at = tl.arange(0, BD)
    x_at = a + tl.minimum(i, m - 1).to(tl.int64)[:, None] * D + at[None, :]
    y_at = b + tl.minimum(j, n - 1).to(tl.int64)[:, None] * D + at[None, :]
    sums = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, D, BD):
        if D % BD == 0:
            x = tl.load(x_at)
            y = tl.load(y_at)
        else:
            inside = (start + at < D)[None, :]
            x = tl.load(x_at, mask=inside, other=0.0)
            y = tl.load(y_at, mask=inside, other=0.0)
        if WIDE:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        if SQUARE:
            y = y * y
        sums = tl.dot(x, tl.trans(y), sums, input_precision="tf32x3")
        x_at += BD
        y_at += BD
    return sums


@triton.jit
def place(m, n, BM: tl.constexpr, BN: tl.constexpr):
    """Return the block (row, column) of this program."""
    rows, columns = tl.cdiv(m, BM), tl.cdiv(n, BN)
    first = tl.program_id(0) // (TOGETHER * columns) * TOGETHER
    height = tl.minimum(rows - first, TOGETHER)
    inside = tl.program_id(0) % (TOGETHER * columns)
    return first + inside % height, inside // height


@triton.jit
def spot(i, j, m, n, row, column, ON_ROWS: tl.constexpr, EACH: tl.constexpr):
    """Return where a block's partial results are stored, and which of them exist.

    The buffer is [blocks of keys, EACH, m] for rows, else [blocks of rows, EACH, n].
    """
    if ON_ROWS:
        return column * EACH * m + i, i < m
    else:
        return row * EACH * n + j, j < n


@triton.jit
def emit(partial, values, i, j, m, n, row, column, ON_ROWS: tl.constexpr):
    """Store sums along one axis."""
    at, inside = spot(i, j, m, n, row, column, ON_ROWS, 1)
    tl.store(partial + at, tl.sum(values, 1 if ON_ROWS else 0), mask=inside)


@triton.jit
def emit_lse(partial, x, i, j, m, n, row, column, ON_ROWS: tl.constexpr):
    """Store log-sum-exps along one axis, as a maximum and a sum relative to it.

    Over no pair they are -inf and 0. The host takes the logarithm: here every warp would.
    """
    AXIS: tl.constexpr = 1 if ON_ROWS else 0
    most = tl.max(x, AXIS)
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(exp(x - tl.expand_dims(base, AXIS)), AXIS)
    at, inside = spot(i, j, m, n, row, column, ON_ROWS, 2)
    tl.store(partial + at, most, mask=inside)
    tl.store(partial + at + (m if ON_ROWS else n), total, mask=inside)


@triton.jit
def phi(x, PHI: tl.constexpr):
    """Return phi(x), as in `tiled.PHI`."""
    if PHI == "softplus":
        e = exp(-tl.abs(x))  # below 1e-4 the logarithm would round e away
        return tl.maximum(x, 0.0) + tl.where(e < 1e-4, e - 0.5 * e * e, tl.log(1.0 + e))
    elif PHI == "relu":
        return tl.maximum(x, 0.0)
    elif PHI == "step":
        return tl.where(x < 0, 0.0, 1.0)
    elif PHI == "linear":
        return x
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def slope(x, PHI: tl.constexpr):
    """Return d phi / dx."""
    if PHI == "softplus":
        e = exp(-tl.abs(x))
        return tl.where(x < 0, e, 1.0) / (1.0 + e)
    elif PHI == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)
