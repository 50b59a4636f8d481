"""What is fetched besides panels: each row's best keys, chosen keys, all ranks' rows."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigabatch.kernels.rules import Rule, check_rule
from gigabatch.kernels.scores import Dot, Score
from gigabatch.kernels.sources import Gather, KeySource, Panel, add_rows, full_precision, wide
from gigabatch.kernels.stats import engine_of


@torch.no_grad()
def row_top(
    score: Score | Tensor, keys: KeySource, k: int, rule: Rule = (), backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k best keys of each query that the rule's masks allow: values [M, k], at least float32,
    descending, and the keys' numbers int64 [M, k]; -inf and -1 where there are fewer. No gradient:
    rescore what is to be differentiated, `score.pairs(take(keys, index))`. Log-weights do not
    count. Memory O(M k) beside the keys. `backend`: see `lse_stats`. ValueError for k < 1."""
    score = Dot(score) if isinstance(score, Tensor) else score
    m, like = len(score.operands[0]), keys.tensors[0]
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least one key")
    values = torch.full((m, k), -torch.inf, dtype=wide(like.dtype), device=like.device)
    index = torch.full((m, k), -1, dtype=torch.int64, device=like.device)

    check_rule(rule, m)
    engine = engine_of(backend, like)

    def work(panel: Panel, _: list[Tensor]) -> list[Tensor]:
        engine.top(score, panel, rule, values, index)
        return []

    with full_precision(like):
        keys.fold(work, [], [])
    return values, index


def take(keys: KeySource, index: Tensor) -> Panel:
    """Keys by their numbers among all, wherever they are: `index` int64 [M] -> a panel of M keys
    with their metadata, differentiable in the source's tensors; zeros where the index is -1.
    ValueError for an index that no key has."""
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index must be int64 [M]; got {index.dtype} {list(index.shape)}")
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < keys.total:
        raise ValueError(f"index must lie in [-1, {keys.total}); got {int(index.min())} to "
                         f"{int(index.max())}")  # fmt: skip
    columns: dict[str, Tensor] = {}
    return Panel(_Take.apply(keys, index, columns, *keys.tensors), columns, 0)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keys: KeySource, index: Tensor, columns: dict[str, Tensor], *tensors: Tensor
    ) -> Tensor:
        chosen: dict[str, Tensor] = {}
        kinds = [tensor.dtype for tensor in keys.tensors]

        def work(panel: Panel, _: list[Tensor]) -> list[Tensor]:
            row, here = _inside(index, panel)
            for name, column in (("", panel.keys), *panel.metadata.items()):
                kind = reduce(torch.promote_types, kinds) if name == "" else column.dtype
                empty = column.new_zeros(len(index), *column.shape[1:], dtype=kind)
                chosen.setdefault(name, empty)[row] = column[here].to(kind)
            return []

        keys.fold(work, [], [])
        ctx.keys, ctx.index = keys, index
        columns.update((name, column) for name, column in chosen.items() if name)
        return chosen[""]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        def work(panel: Panel, _: list[Tensor]) -> list[Tensor]:
            row, here = _inside(ctx.index, panel)
            dk = torch.zeros_like(panel.keys, dtype=wide(panel.keys.dtype))
            add_rows(dk, here, grad[row].to(dk.dtype))
            return [dk]

        tensors = ctx.keys.tensors
        (grads,) = ctx.keys.fold(work, [], ["grad"])
        dkeys = zip(grads.split([len(t) for t in tensors]), tensors, strict=True)
        return None, None, None, *(dk.to(tensor.dtype) for dk, tensor in dkeys)


def _inside(index: Tensor, panel: Panel) -> tuple[Tensor, Tensor]:
    """Which entries name a key of this panel, and which one, counted from its first."""
    here = (index >= panel.offset) & (index < panel.offset + len(panel.keys))
    row = here.nonzero().squeeze(1)
    return row, index[row] - panel.offset


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows in rank order, [n, ...] -> [N, ...], differentiable: a rank receives the sum
    over ranks of what its own rows are given."""
    if group is None:
        return rows
    source = Gather(rows, {}, group)
    return take(source, torch.arange(source.total, device=rows.device)).keys


def sum_rows(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks of a tensor of any shape, on each of them, differentiable."""
    return gather_rows(value.unsqueeze(0), group).sum(0)
