"""Argument checks of the losses. They run before any collective, except `check_finite`."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels.sources import accumulator_dtype, all_sum
from gigabatch.kernels.stats import load_backend


def check_inputs(
    q: Tensor, k: Tensor, gather_mode: str, backend: str | None, ndim: int = 2, paired: bool = True,
    **scalars: Tensor,
) -> None:  # fmt: skip
    """Check shapes, dtypes and devices of both sides and of 0-dim `scalars`, by name.

    Raises:
        TypeError: if q and k do not share a floating dtype.
        ValueError: if a shape, a device, the gather mode or the back end is wrong, or, with
            `paired`, if q and k differ in their number of rows.
    """
    if q.ndim != ndim or k.ndim != ndim or q.shape[-1] != k.shape[-1]:
        expected = "[n, D]" if ndim == 2 else "[n, tokens, D]"
        raise ValueError(f"q and k must be {expected}; got {tuple(q.shape)} and {tuple(k.shape)}")
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise TypeError(f"q and k must share a floating dtype; got {q.dtype} and {k.dtype}")
    devices = [str(tensor.device) for tensor in (q, k, *scalars.values())]
    if len(set(devices)) > 1:
        raise ValueError(f"q, k, {', '.join(scalars)} must share a device; got {devices}")
    for name, value in scalars.items():
        if value.ndim != 0 or not value.is_floating_point():
            shape = tuple(value.shape)
            raise ValueError(f"{name} must be 0-dimensional, floating; got {shape}, {value.dtype}")
    if paired and len(q) != len(k):
        raise ValueError(f"row i belongs to key i; got {len(q)} rows and {len(k)} keys")
    if gather_mode not in ("gather", "ring"):
        raise ValueError(f"gather_mode is {gather_mode!r}; choose gather or ring")
    load_backend(backend, q)


def check_columns(
    q: Tensor, k: Tensor, bias: Tensor | None, **pairs: tuple[Tensor | None, Tensor | None]
) -> None:
    """Check a per-key bias, and int64 columns of both sides, by name.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or device is wrong, or only the key side's column is given.
    """
    columns = [("bias", bias, k)]
    for name, (of_q, of_k) in pairs.items():
        if of_q is None and of_k is not None:
            raise ValueError(f"give {name}_q with {name}_k")
        columns += [(f"{name}_q", of_q, q), (f"{name}_k", of_q if of_k is None else of_k, k)]
    for name, column, rows in columns:
        if column is None:
            continue
        if column.dtype != torch.int64 if name != "bias" else not column.is_floating_point():
            expected = "int64" if name != "bias" else "floating"
            raise TypeError(f"{name} must be {expected}; got {column.dtype}")
        if column.shape != (len(rows),) or column.device != q.device:
            actual = f"{tuple(column.shape)} on {column.device}"
            raise ValueError(f"{name} must be [{len(rows)}] on {q.device}; got {actual}")


def check_finite(group: dist.ProcessGroup | None, **tensors: Tensor | None) -> None:
    """Check that tensors are finite, by name. Collective: every rank must call it.

    Raises:
        ValueError: on every rank, if a tensor of any rank holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        count = 0 if tensor is None else int(all_sum((~tensor.isfinite()).sum(), group))
        if count:
            raise ValueError(f"{name} holds {count} values that are NaN or infinite")


def normalized_teachers(
    q: Tensor, k: Tensor, teacher_q: Tensor | None, teacher_k: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Check a teacher's vectors of both sides and return them with length 1, without gradient.

    A zero vector stays 0. Without `teacher_k` both sides share `teacher_q`.

    Raises:
        TypeError: if a dtype or device is wrong.
        ValueError: if a shape is wrong, or only the key side's vectors are given.
    """
    if teacher_q is None:
        if teacher_k is not None:
            raise ValueError("give teacher_q with teacher_k")
        return None
    teacher_k = teacher_q if teacher_k is None else teacher_k
    for name, vectors, rows in (("teacher_q", teacher_q, q), ("teacher_k", teacher_k, k)):
        if vectors.ndim != 2 or len(vectors) != len(rows) or vectors.shape[1] != teacher_q.shape[1]:
            raise ValueError(f"{name} must be [{len(rows)}, E]; got {tuple(vectors.shape)}")
        if not vectors.is_floating_point() or vectors.device != rows.device:
            actual = f"{vectors.dtype} on {vectors.device}"
            raise TypeError(f"{name} must be floating, on {rows.device}; got {actual}")
    one, other = (
        F.normalize(vectors.detach().to(accumulator_dtype(vectors.dtype)), dim=1)
        for vectors in (teacher_q, teacher_k)
    )
    return one, other
