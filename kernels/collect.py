"""Rows from a key source or from other ranks: top-k keys, keys by index, all ranks' rows."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigabatch.kernels.rules import Rule, check_rule
from gigabatch.kernels.scores import Dot, Score
from gigabatch.kernels.sources import (
    Gather,
    KeyBlock,
    KeySource,
    accumulator_dtype,
    add_rows,
    no_autocast,
)
from gigabatch.kernels.stats import load_backend


@torch.no_grad()
def row_top(
    score: Score | Tensor, keys: KeySource, k: int, rule: Rule = (), backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k best keys of each query, without gradient. Memory O(M k), apart from the keys.

    To differentiate a found key's score, compute it again: `score.pairs(take(keys, index))`.

    Args:
        score: A score, or queries [M, D] for the dot product.
        keys: Source of N keys.
        k: Number of keys per query, at least 1.
        rule: Masks select eligible pairs; log-weights are ignored.
        backend: As in `lse_stats`.

    Returns:
        Scores [M, k], at least float32, descending; and the keys' global indices, int64 [M, k].
        Where a query has fewer eligible keys: -inf and -1.

    Raises:
        ValueError: if k < 1, or as `lse_stats`.
    """
    score = Dot(score) if isinstance(score, Tensor) else score
    m, like = len(score.operands[0]), keys.tensors[0]
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    dtype = accumulator_dtype(like.dtype)
    top_scores = torch.full((m, k), -torch.inf, dtype=dtype, device=like.device)
    top_indices = torch.full((m, k), -1, dtype=torch.int64, device=like.device)

    check_rule(rule, m)
    engine = load_backend(backend, like)

    def work(block: KeyBlock, _: list[Tensor]) -> list[Tensor]:
        engine.update_top_k(score, block, rule, top_scores, top_indices)
        return []

    with no_autocast(like):
        keys.fold(work, [], [])
    return top_scores, top_indices


def take(keys: KeySource, index: Tensor) -> KeyBlock:
    """Collect keys by their global indices, from whichever rank holds them.

    Args:
        keys: Source of N keys.
        index: int64 [M] in [-1, N); -1 gives zeros.

    Returns:
        A block of M keys with their metadata, differentiable in the source's tensors.

    Raises:
        ValueError: if an index is out of range, or `index` is not int64 [M].
    """
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index must be int64 [M]; got {index.dtype} {list(index.shape)}")
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < keys.total:
        raise ValueError(f"index must lie in [-1, {keys.total}); got {int(index.min())} to "
                         f"{int(index.max())}")  # fmt: skip
    columns: dict[str, Tensor] = {}  # `_Take` fills it
    taken: Tensor = _Take.apply(keys, index, columns, *keys.tensors)  # type: ignore[no-untyped-call]
    return KeyBlock(taken, columns, 0)


class _Take(torch.autograd.Function):
    """`take`, as a differentiable function of the source's tensors."""

    @staticmethod
    def forward(
        ctx: Any, keys: KeySource, index: Tensor, columns: dict[str, Tensor], *tensors: Tensor
    ) -> Tensor:
        taken: dict[str, Tensor] = {}  # the keys under "", metadata under their names
        key_dtype = reduce(torch.promote_types, [tensor.dtype for tensor in keys.tensors])

        def work(block: KeyBlock, _: list[Tensor]) -> list[Tensor]:
            row, position = _locate(index, block)
            for name, column in (("", block.keys), *block.metadata.items()):
                dtype = key_dtype if name == "" else column.dtype
                empty = column.new_zeros(len(index), *column.shape[1:], dtype=dtype)
                taken.setdefault(name, empty)[row] = column[position].to(dtype)
            return []

        keys.fold(work, [], [])
        ctx.keys, ctx.index = keys, index
        columns.update((name, column) for name, column in taken.items() if name)
        return taken[""]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        def work(block: KeyBlock, _: list[Tensor]) -> list[Tensor]:
            row, position = _locate(ctx.index, block)
            dk = torch.zeros_like(block.keys, dtype=accumulator_dtype(block.keys.dtype))
            add_rows(dk, position, grad[row].to(dk.dtype))
            return [dk]

        tensors = ctx.keys.tensors
        (grads,) = ctx.keys.fold(work, [], ["grad"])
        dkeys = zip(grads.split([len(t) for t in tensors]), tensors, strict=True)
        return None, None, None, *(dk.to(tensor.dtype) for dk, tensor in dkeys)


def _locate(index: Tensor, block: KeyBlock) -> tuple[Tensor, Tensor]:
    """Return which entries of `index` are keys of this block, and their positions in the block."""
    inside = (index >= block.offset) & (index < block.offset + len(block.keys))
    row = inside.nonzero().squeeze(1)
    return row, index[row] - block.offset


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather all ranks' rows in rank order, [n, ...] -> [N, ...], differentiably.

    A rank receives the sum over ranks of the gradients of its rows. Without a group the result
    is `rows` itself.
    """
    if group is None:
        return rows
    source = Gather(rows, {}, group)
    return take(source, torch.arange(source.total, device=rows.device)).keys


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a tensor of any shape over ranks; every rank gets the sum, differentiably."""
    return gather_rows(value.unsqueeze(0), group).sum(0)
