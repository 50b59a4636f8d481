"""What Triton kernels do with a block [BM, BN] of pairs: products, values to broadcast, sums.

A block is reduced to one partial result a row or a key, which the host merges in a fixed order: no
atomics, so that two runs agree to the last bit. i, j: numbers of its rows and keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # a GPU's exponential is of base 2: no product an entry


@triton.constexpr_function
def of(record, name, index=None):
    """A field of a constant record, or one of its entries. (A tuple of records would not do as a
    compile-time value.)"""
    found = record[name] if isinstance(name, int) else getattr(record, name)
    return found if index is None else found[index]


@triton.constexpr_function
def count(record, name):
    return len(getattr(record, name))


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
def place(m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The block (row, column) of this program. GROUP rows of blocks are worked on together, so that
    the keys they share stay in the L2 cache."""
    rows, columns = tl.cdiv(m, BM), tl.cdiv(n, BN)
    first = tl.program_id(0) // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = tl.program_id(0) % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def emit(partial, values, i, j, m, n, row, column, ON_ROWS: tl.constexpr):
    """Store sums along one axis: for rows [blocks of keys, m], else [blocks of rows, n]."""
    if ON_ROWS:
        tl.store(partial + column * m + i, tl.sum(values, 1), mask=i < m)
    else:
        tl.store(partial + row * n + j, tl.sum(values, 0), mask=j < n)


@triton.jit
def emit_lse(partial, x, i, j, m, n, row, column, ON_ROWS: tl.constexpr):
    """The same for log-sum-exps of base 2: all maxima, then all sums relative to them; over
    nothing, -inf and 0. (Their logarithms would be taken by every warp.)"""
    AXIS: tl.constexpr = 1 if ON_ROWS else 0
    most = tl.max(x, AXIS)
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.exp2(x - tl.expand_dims(base, AXIS)), AXIS)
    if ON_ROWS:
        at = partial + column * m + i
        tl.store(at, most, mask=i < m)
        tl.store(at + tl.cdiv(n, j.shape[0]) * m, total, mask=i < m)
    else:
        at = partial + row * n + j
        tl.store(at, most, mask=j < n)
        tl.store(at + tl.cdiv(m, i.shape[0]) * n, total, mask=j < n)


@triton.jit
def phi(x, PHI: tl.constexpr):
    """See `tiled.PHI`."""
    if PHI == "softplus":
        e = tl.exp(-tl.abs(x))  # below 1e-4 the logarithm would round e away
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
        e = tl.exp(-tl.abs(x))
        return tl.where(x < 0, e, 1.0) / (1.0 + e)
    elif PHI == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)
