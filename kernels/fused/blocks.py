"""Operations of Triton kernels on a block [BM, BN] of pairs: products, broadcasts, reductions.

A block is reduced to one partial result per row or key. The host merges partial results in a fixed
order, without atomics, so that two runs give the same bits. i [BM] and j [BN] are row and key
indices.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
GROUP_ROWS = tl.constexpr(8)  # row blocks scheduled together so that their keys stay in L2


# Triton does not accept a tuple of dataclasses as a compile-time value. These functions therefore
# return one attribute or one entry at a time.
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
    """Load one value per row, [BM, 1]; 0 for rows that do not exist."""
    return tl.load(values + i, mask=i < m, other=0)[:, None]


@triton.jit
def per_key(values, j, n):
    """Load one value per key, [1, BN]; 0 for keys that do not exist."""
    return tl.load(values + j, mask=j < n, other=0)[None, :]


@triton.jit
def product(
    a, b, i, j, m, n, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, SQUARE: tl.constexpr
):
    """Return <a_i, b_j>, or <a_i, b_j^2> with SQUARE, for rows of a [m, D] and b [n, D].

    Sums are float32; with WIDE, so are the products. Out-of-range rows load the last row; the
    caller must mask them.
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
def block_position(m, n, BM: tl.constexpr, BN: tl.constexpr):
    """Return the position (row, column) of this program's block in the grid of blocks."""
    rows, columns = tl.cdiv(m, BM), tl.cdiv(n, BN)
    first = tl.program_id(0) // (GROUP_ROWS * columns) * GROUP_ROWS
    height = tl.minimum(rows - first, GROUP_ROWS)
    inside = tl.program_id(0) % (GROUP_ROWS * columns)
    return first + inside % height, inside // height


@triton.jit
def partial_offsets(i, j, m, n, row, column, ON_ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Return the offsets at which a block's partial results are stored, and which of them exist.

    With ON_ROWS the buffer is [blocks of keys, COUNT, m], else [blocks of rows, COUNT, n].
    """
    if ON_ROWS:
        return column * COUNT * m + i, i < m
    else:
        return row * COUNT * n + j, j < n


@triton.jit
def store_sums(partial, values, i, j, m, n, row, column, ON_ROWS: tl.constexpr):
    """Store a block's sums along one axis."""
    at, inside = partial_offsets(i, j, m, n, row, column, ON_ROWS, 1)
    tl.store(partial + at, tl.sum(values, 1 if ON_ROWS else 0), mask=inside)


@triton.jit
def store_lse(partial, x, i, j, m, n, row, column, ON_ROWS: tl.constexpr):
    """Store a block's log-sum-exps along one axis, as a maximum and a sum relative to it.

    If no pair counts, they are -inf and 0. The logarithm is taken on the host, once per result
    instead of once per warp.
    """
    AXIS: tl.constexpr = 1 if ON_ROWS else 0
    maximum = tl.max(x, AXIS)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(exp(x - tl.expand_dims(base, AXIS)), AXIS)
    at, inside = partial_offsets(i, j, m, n, row, column, ON_ROWS, 2)
    tl.store(partial + at, maximum, mask=inside)
    tl.store(partial + at + (m if ON_ROWS else n), total, mask=inside)


@triton.jit
def phi(x, PHI: tl.constexpr):
    """Return phi(x), as in `tiled.PHI`."""
    if PHI == "softplus":
        e = exp(-tl.abs(x))  # 1 + e would round off an e below 1e-4, so use a series there
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
