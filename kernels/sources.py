"""Key sources: where the keys of a loss come from. All collectives of the engine live here.

A rank holds its rows and sees all keys. Only the key side's embeddings travel; column statistics
need two O(N) reductions; key gradients are summed over ranks and each rank keeps its slice.

Convention: what is differentiated is the *sum over ranks* of the values that ranks return.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Panel:
    """Keys at hand: `keys` [m, D], `metadata` columns [m], `offset` of the first among all."""

    keys: Tensor
    metadata: Mapping[str, Tensor]
    offset: int


class KeySource(Protocol):
    """What the engine asks of a source."""

    @property
    def k(self) -> Tensor:
        """The differentiable tensor: this rank's slice of the keys, [n, D]."""

    def panels(self) -> Iterator[Panel]:
        """All keys, a panel at a time, detached; always the same panels in the same order."""

    def begin_grad(self) -> Tensor:
        """A zeroed float accumulator [N, D] for `accept_grad`."""

    def accept_grad(self, total: Tensor, panel: Panel, dk: Tensor) -> None:
        """Add a panel's gradient."""

    def end_grad(self, total: Tensor) -> Tensor:
        """This rank's slice of the gradient, summed over ranks: [n, D]."""

    def merge_lse(self, z: Tensor) -> Tensor:
        """Log-sum-exps [N] of columns over this rank's rows, merged over ranks -> slice [n]."""

    def merge_sum(self, value: Tensor) -> Tensor:
        """Column sums [N] over this rank's rows, added over ranks -> this rank's slice [n]."""

    def spread(self, value: Tensor) -> Tensor:
        """A slice [n] of a per-key quantity -> all [N]."""


@dataclass(frozen=True)
class Local:
    """Keys of this process alone; `k` [N, D], `metadata` columns [N]."""

    k: Tensor
    metadata: Mapping[str, Tensor] = field(default_factory=dict)

    def panels(self) -> Iterator[Panel]:
        yield Panel(self.k.detach(), self.metadata, 0)

    def begin_grad(self) -> Tensor:
        return _accumulator(self.k, self.k.shape[0])

    def accept_grad(self, total: Tensor, panel: Panel, dk: Tensor) -> None:
        total[panel.offset : panel.offset + len(dk)] += dk

    def end_grad(self, total: Tensor) -> Tensor:
        return total

    def merge_lse(self, z: Tensor) -> Tensor:
        return z

    def merge_sum(self, value: Tensor) -> Tensor:
        return value

    def spread(self, value: Tensor) -> Tensor:
        return value


class Gather:
    """Keys of every rank of `group`, gathered in rank order; slices may differ in length.

    `k`: this rank's keys [n, D]. `metadata`: its columns [n], which travel too. Memory O(N D).
    """

    def __init__(self, k: Tensor, metadata: Mapping[str, Tensor], group: dist.ProcessGroup):
        self.k, self.group = k, group
        self.world_size = dist.get_world_size(group)
        self.sizes = _all_sizes(len(k), k.device, group)
        self.start = sum(self.sizes[: dist.get_rank(group)])
        self._keys = self.spread(k.detach())
        self._metadata = {name: self.spread(column) for name, column in metadata.items()}

    def panels(self) -> Iterator[Panel]:
        yield Panel(self._keys, self._metadata, 0)

    def begin_grad(self) -> Tensor:
        return _accumulator(self.k, sum(self.sizes))

    def accept_grad(self, total: Tensor, panel: Panel, dk: Tensor) -> None:
        total[panel.offset : panel.offset + len(dk)] += dk

    def end_grad(self, total: Tensor) -> Tensor:
        if len(set(self.sizes)) == 1 and total.device.type != "cpu":
            mine = total.new_empty(self.sizes[0], total.shape[1])
            dist.reduce_scatter_tensor(mine, total, group=self.group)
            return mine
        # gloo has no reduce-scatter of its own, and slices may be uneven.
        return self.merge_sum(total).clone()

    def merge_lse(self, z: Tensor) -> Tensor:
        top = z.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        # A column masked on every rank stays -inf: exp(-inf - finite) is 0, and log 0 is -inf.
        safe = torch.where(top == -torch.inf, 0, top)
        return safe[self._mine] + self.merge_sum(torch.exp(z - safe)).log()

    def merge_sum(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, group=self.group)
        return value[self._mine]

    def spread(self, value: Tensor) -> Tensor:
        longest = max(self.sizes)
        padded = value.new_zeros(longest, *value.shape[1:])
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, self.sizes, strict=True)])

    @property
    def _mine(self) -> slice:
        return slice(self.start, self.start + len(self.k))


def _accumulator(k: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, k.shape[1], dtype=wide(k.dtype), device=k.device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums for inputs of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _all_sizes(n: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    mine = torch.tensor([n], device=device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return [int(size) for size in sizes]
