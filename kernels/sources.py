"""Key sources: where the keys of a loss come from. All collectives of the engine live here.

A rank holds its rows and sees all keys. Only the key side's embeddings travel; what belongs to a
key (column statistics, gradients) is merged over ranks and ends at the rank that owns the key.

Convention: what is differentiated is the *sum over ranks* of the values that ranks return.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

ALL = slice(None)
Merge = Literal["grad", "sum", "lse"]


@dataclass(frozen=True)
class Panel:
    """Keys at hand: `keys` [m, ...], `metadata` columns [m, ...], `offset`: the first one's number
    among all keys. `rows`: the only queries that see them."""

    keys: Tensor
    metadata: Mapping[str, Tensor]
    offset: int
    rows: slice = field(default_factory=lambda: ALL)
    only: tuple[Any, ...] = ()  # clauses that hold besides those of any rule

    def cut(self, part: slice) -> Panel:
        """Some of the keys, and of every column."""
        metadata = {name: column[part] for name, column in self.metadata.items()}
        offset = self.offset + part.start
        return replace(self, keys=self.keys[part], metadata=metadata, offset=offset)

    def to(self, kind: torch.dtype) -> Panel:
        return replace(self, keys=self.keys.to(kind))


Work = Callable[[Panel, list[Tensor]], list[Tensor]]


class KeySource(ABC):
    """What the engine asks of a source: to bring all keys by, a panel at a time.

    `tensors`: what is differentiated, if it `learns` at all: else, as a queue or a teacher's keys,
    it costs no gradient, neither its product nor its way home. `total`: number of keys, over all
    ranks. `held`: of those that belong to this rank, the length of its per-key values.
    """

    tensors: tuple[Tensor, ...]
    learns: bool
    total: int
    held: int

    @abstractmethod
    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        """Call `work(panel, columns of the panel)` for all keys, always the same panels in the
        same order. `columns`: per-key values [held]. `work` returns per-key results [m, ...] from
        this rank's rows, one for each of `merges`: "sum" adds them over ranks, "lse" is their
        log-sum-exp, "grad" (only the first) is the gradient of the panel's keys, summed.

        Returns this rank's part of the merged results [held, ...]; of a "grad" the gradients of
        `tensors`, concatenated."""


class Local(KeySource):
    """Keys that this process holds: `k` [N, ...], `metadata` columns [N].

    Also a queue (keys without gradient, the same on every rank) and prototypes (a parameter, the
    same on every rank: sum its gradient over ranks, as for any parameter). Column statistics cover
    this process's rows alone.
    """

    def __init__(self, k: Tensor, metadata: Mapping[str, Tensor] | None = None) -> None:
        self.tensors, self.total, self.held = (k,), len(k), len(k)
        self.learns = k.requires_grad
        self.panel = Panel(k.detach(), checked(k, metadata or {}), 0)

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        return work(self.panel, list(columns))


class Gather(KeySource):
    """Keys of every rank of `group`, gathered in rank order; slices may differ in length.

    `k`: this rank's keys [n, ...]. `metadata`: its columns [n], which travel too. Memory O(N D).
    """

    def __init__(self, k: Tensor, metadata: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
        self.group = group
        self.sizes, self.learns = agreed(k, checked(k, metadata), group)
        self.tensors, self.total, self.held = (k,), sum(self.sizes), len(k)
        spread = {name: self.spread(column) for name, column in metadata.items()}
        self.panel = Panel(self.spread(k), spread, 0)

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        results = work(self.panel, [self.spread(column) for column in columns])
        return [
            self._merge_lse(result) if how == "lse" else self._merge_sum(result)
            for how, result in zip(merges, results, strict=True)
        ]

    def spread(self, value: Tensor) -> Tensor:
        """A slice [n, ...] of something per key -> all of it [N, ...]."""
        padded = value.new_zeros(max(self.sizes), *value.shape[1:])
        padded[: len(value)] = value.detach()
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, self.sizes, strict=True)])

    def _merge_lse(self, z: Tensor) -> Tensor:
        top = z.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        # A column masked on every rank stays -inf: exp(-inf - finite) is 0, and log 0 is -inf.
        safe = torch.where(top == -torch.inf, 0, top)
        return safe[self._mine] + self._merge_sum(torch.exp(z - safe)).log()

    def _merge_sum(self, value: Tensor) -> Tensor:
        if len(set(self.sizes)) == 1 and value.device.type != "cpu":
            mine = value.new_empty(self.sizes[0], *value.shape[1:])
            dist.reduce_scatter_tensor(mine, value, group=self.group)
            return mine
        # gloo has no reduce-scatter of its own, and slices may be uneven.
        return all_sum(value, self.group)[self._mine].clone()

    @property
    def _mine(self) -> slice:
        start = sum(self.sizes[: dist.get_rank(self.group)])
        return slice(start, start + self.held)


class Ring(KeySource):
    """The keys of `Gather`, passed from rank to rank: memory O(n D), whatever the world size.

    While a panel is worked on, the next one is on its way; column results and key gradients travel
    behind their panel, each rank adding its share, until they are home. Panels come in another
    order on each rank, so sums round differently than under `Gather`; from run to run they agree.
    """

    def __init__(self, k: Tensor, metadata: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
        self.group = group
        self.sizes, self.learns = agreed(k, checked(k, metadata), group)
        self.tensors, self.total, self.held = (k,), sum(self.sizes), len(k)
        self.rank, self.world_size, self.metadata = dist.get_rank(group), group.size(), metadata

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        names, done = list(self.metadata), list[Tensor]()
        held = [v.detach().contiguous() for v in (*self.tensors, *self.metadata.values(), *columns)]
        rooms: dict[tuple[str, int], list[Tensor]] = {}  # two of each kind, in turns

        def room(kind: str, turn: int, values: Sequence[Tensor], owner: int) -> list[Tensor]:
            for value in values if (kind, turn % 2) not in rooms else ():
                largest = value.new_empty(max(self.sizes), *value.shape[1:])
                rooms.setdefault((kind, turn % 2), []).append(largest)
            size = self.sizes[owner % self.world_size]
            return [value[:size] for value in rooms.get((kind, turn % 2), [])]

        for step in range(self.world_size):
            owner, last = (self.rank + step) % self.world_size, step == self.world_size - 1
            arriving = [] if last else room("held", step, held, owner + 1)
            merged = room("done", step, done, owner) if step else []  # earlier ranks' findings
            requests = self._exchange(done if last else held + done, arriving + merged)
            metadata = dict(zip(names, held[1:], strict=False))
            panel = Panel(held[0], metadata, sum(self.sizes[:owner]))
            results = work(panel, held[1 + len(names) :])
            for request in requests:
                request.wait()
            for how, old, new in zip(merges, merged, results, strict=False):
                torch.logaddexp(old, new, out=old) if how == "lse" else old.add_(new)
            done, held = merged if step else results, arriving
        home = room("done", self.world_size, done, self.rank)
        for request in self._exchange(done, home):
            request.wait()
        return home if self.world_size > 1 else done

    def _exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[dist.Work]:
        """Start sending to the rank before this one, and receiving what the one behind sends."""
        if self.world_size == 1:
            return []
        before, behind = (
            dist.get_global_rank(self.group, (self.rank + d) % self.world_size) for d in (-1, 1)
        )
        transfers = [
            dist.P2POp(operation, value, peer, self.group, tag)
            for operation, values, peer in (
                (dist.isend, outgoing, before), (dist.irecv, incoming, behind),
            )
            for tag, value in enumerate(values) if value.numel()
        ]  # fmt: skip
        return dist.batch_isend_irecv(transfers) if transfers else []


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums for inputs of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(like: Tensor) -> torch.autocast:
    """Keeps a surrounding autocast from rounding products here."""
    return torch.autocast(like.device.type, enabled=False)


def add_rows(total: Tensor, index: Tensor, values: Tensor) -> None:
    """total[index] += values, in the same order on every run: on a CPU index_put, on a GPU
    index_add would add atomically."""
    if total.device.type == "cpu":
        total.index_add_(0, index, values)
    else:
        total.index_put_((index,), values, accumulate=True)


def checked(k: Tensor, metadata: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for name, column in metadata.items():
        if len(column) != len(k):
            raise ValueError(f"metadata {name!r} must have {len(k)} entries; got {len(column)}")
    return metadata


def agreed(
    k: Tensor, metadata: Mapping[str, Tensor], group: dist.ProcessGroup
) -> tuple[list[int], bool]:
    """Every rank's number of keys, and whether any rank's want a gradient: one without a row may
    hold a constant. ValueError on all of them where other shapes or dtypes differ, since a
    collective over unlike tensors ends the process."""
    kinds = [(name, t.dtype, t.shape[1:]) for name, t in (("k", k), *sorted(metadata.items()))]
    told = [len(k), zlib.crc32(repr(kinds).encode()), k.requires_grad]
    mine = torch.tensor(told, dtype=torch.int64, device=k.device)
    found = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(found, mine, group=group)
    sizes, checks, learns = torch.stack(found).T.tolist()
    if len(set(checks)) > 1:
        raise ValueError(f"keys and metadata must be alike on all ranks; on this one {kinds}")
    return sizes, any(learns)


def all_sum(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks, in place and without gradient."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def global_row_indices(n: int, device: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    """int64 [n]: the numbers of this rank's rows in the global batch, ranks in order."""
    rows = torch.empty(n, 0, device=device)
    sizes = [] if group is None else agreed(rows, {}, group)[0][: dist.get_rank(group)]
    return torch.arange(sum(sizes), sum(sizes) + n, device=device)
