"""What Triton kernels do with a block [BM, BN] of pairs: products, values to broadcast, sums.

A block is reduced to one partial result a row or a key, which the host merges in a fixed order: no
atomics, so that two runs agree to the last bit. i, j: numbers of its rows and keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
TOGETHER = tl.constexpr(8)  # rows of blocks: the keys they share then stay in the L2 cache


# A tuple of records would not do as a compile-time value, so that each is reached in one step.
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
    """Of base e, by the GPU's own of base 2; `tl.exp` takes more instructions."""
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
    """<a_i, b_j>, or with SQUARE <a_i, b_j^2>, of rows of a [m, D] and b [n, D], accumulated in
    float32; WIDE: float32 products. Rows past the last are read as the last: whoever uses the
    result masks them."""
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
    """The block (row, column) of this program."""
    rows, columns = tl.cdiv(m, BM), tl.cdiv(n, BN)
    first = tl.program_id(0) // (TOGETHER * columns) * TOGETHER
    height = tl.minimum(rows - first, TOGETHER)
    inside = tl.program_id(0) % (TOGETHER * columns)
    return first + inside % height, inside // height


@triton.jit
def spot(i, j, m, n, row, column, ON_ROWS: tl.constexpr, EACH: tl.constexpr):
    """Where a block's partial results go, for rows in [blocks of keys, EACH, m], else in [blocks of
    rows, EACH, n], and which of them there are."""
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
    """Store log-sum-exps along one axis, as a maximum and a sum relative to it; over nothing, -inf
    and 0. (Logarithms of them would be taken by every warp.)"""
    AXIS: tl.constexpr = 1 if ON_ROWS else 0
    most = tl.max(x, AXIS)
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(exp(x - tl.expand_dims(base, AXIS)), AXIS)
    at, inside = spot(i, j, m, n, row, column, ON_ROWS, 2)
    tl.store(partial + at, most, mask=inside)
    tl.store(partial + at + (m if ON_ROWS else n), total, mask=inside)


@triton.jit
def phi(x, PHI: tl.constexpr):
    """See `tiled.PHI`."""
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
    """d phi / dx."""
    if PHI == "softplus":
        e = exp(-tl.abs(x))
        return tl.where(x < 0, e, 1.0) / (1.0 + e)
    elif PHI == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)
