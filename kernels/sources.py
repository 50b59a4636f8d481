"""Key sources: where the keys of a loss come from. All collectives of the engine are here.

A rank holds its own rows and sees the keys of all ranks. Only the key side's embeddings travel.
Per-key results (column statistics, gradients) are merged over ranks and end at the rank that owns
the key.

Convention: gradients are those of the *sum* of all ranks' return values.
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

ALL_ROWS = slice(None)
Merge = Literal["grad", "sum", "lse"]
Range = slice  # inside `KeyBlock` its method `slice` hides the builtin


@dataclass(frozen=True)
class KeyBlock:
    """A contiguous block of keys with their metadata.

    Attributes:
        keys: [m, ...], any floating dtype.
        metadata: Columns [m, ...] by name.
        offset: Global index of the first key.
        rows: The queries that see these keys.
        clauses: Clauses that apply to this block, in addition to those of any rule.
    """

    keys: Tensor
    metadata: Mapping[str, Tensor]
    offset: int
    rows: Range = field(default_factory=lambda: ALL_ROWS)
    clauses: tuple[Any, ...] = ()

    def slice(self, part: Range) -> KeyBlock:
        """Return some of the keys, with their part of every column."""
        metadata = {name: column[part] for name, column in self.metadata.items()}
        offset = self.offset + part.start
        return replace(self, keys=self.keys[part], metadata=metadata, offset=offset)

    def to(self, dtype: torch.dtype) -> KeyBlock:
        return replace(self, keys=self.keys.to(dtype))


Work = Callable[[KeyBlock, list[Tensor]], list[Tensor]]


class KeySource(ABC):
    """Supplier of all keys, one block at a time.

    Attributes:
        tensors: Differentiable tensors that the keys are made from.
        requires_grad: Whether `tensors` need a gradient. Constant keys (a queue, a teacher's keys)
            cost neither the gradient's matrix product nor its communication.
        total: Number of keys over all ranks.
        held: Number of keys that belong to this rank; the length of its per-key values.
    """

    tensors: tuple[Tensor, ...]
    requires_grad: bool
    total: int
    held: int

    @abstractmethod
    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        """Call `work(block, columns of the block)` for all keys and merge the results over ranks.

        Every call visits the same blocks in the same order.

        Args:
            work: Returns per-key results [m, ...] from this rank's rows, one for each of `merges`.
            columns: Per-key values [held, ...] that travel with the keys.
            merges: How to merge each result over ranks: "sum" adds, "lse" takes the log-sum-exp,
                "grad" (only as the first) is the gradient of the block's keys, summed.

        Returns:
            This rank's part of each merged result, [held, ...]. For "grad": the gradients of
            `tensors`, concatenated.
        """


class Local(KeySource):
    """Keys that this process holds.

    Use it also for a queue (keys without gradient, the same on every rank) and for prototypes (a
    parameter, the same on every rank: sum its gradient over ranks, as for any parameter). Column
    statistics cover this process's rows only.

    Args:
        k: [N, ...] keys.
        metadata: Columns [N, ...] by name.

    Raises:
        ValueError: if a column's length is not N.
    """

    def __init__(self, k: Tensor, metadata: Mapping[str, Tensor] | None = None) -> None:
        self.tensors, self.total, self.held = (k,), len(k), len(k)
        self.requires_grad = k.requires_grad
        self.block = KeyBlock(k.detach(), check_metadata(k, metadata or {}), 0)

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        return work(self.block, list(columns))


class Gather(KeySource):
    """Keys of every rank of a group, gathered in rank order. Memory O(N D).

    Args:
        k: [n, ...] this rank's keys; n may differ between ranks.
        metadata: This rank's columns [n, ...], which are gathered too.
        group: Process group.

    Raises:
        ValueError: on every rank, if dtypes or trailing shapes differ between ranks.
    """

    def __init__(self, k: Tensor, metadata: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
        self.group = group
        self.sizes, self.requires_grad = exchange_sizes(k, check_metadata(k, metadata), group)
        self.tensors, self.total, self.held = (k,), sum(self.sizes), len(k)
        gathered = {name: self.gather(column) for name, column in metadata.items()}
        self.block = KeyBlock(self.gather(k), gathered, 0)

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        results = work(self.block, [self.gather(column) for column in columns])
        return [
            self._merge_lse(result) if merge == "lse" else self._merge_sum(result)
            for merge, result in zip(merges, results, strict=True)
        ]

    def gather(self, value: Tensor) -> Tensor:
        """Return all ranks' per-key values [N, ...] from this rank's [n, ...], without gradient."""
        padded = value.new_zeros(max(self.sizes), *value.shape[1:])
        padded[: len(value)] = value.detach()
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        with no_autocast(value):  # autocast on a CPU does not concatenate float16
            return torch.cat([part[:n] for part, n in zip(parts, self.sizes, strict=True)])

    def _merge_lse(self, z: Tensor) -> Tensor:
        maximum = z.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.group)
        # A column masked on every rank stays -inf: exp(-inf - finite) is 0, and log 0 is -inf.
        safe = torch.where(maximum == -torch.inf, 0, maximum)
        return safe[self._local_keys] + self._merge_sum(torch.exp(z - safe)).log()

    def _merge_sum(self, value: Tensor) -> Tensor:
        if len(set(self.sizes)) == 1 and value.device.type != "cpu":
            local = value.new_empty(self.sizes[0], *value.shape[1:])
            dist.reduce_scatter_tensor(local, value, group=self.group)
            return local
        # gloo has no reduce-scatter, and slices may be uneven.
        return all_sum(value, self.group)[self._local_keys].clone()

    @property
    def _local_keys(self) -> slice:
        start = sum(self.sizes[: dist.get_rank(self.group)])
        return slice(start, start + self.held)


class Ring(KeySource):
    """The keys of `Gather`, passed from rank to rank. Memory O(n D) at every world size.

    The next block travels while one is processed. Column results and key gradients follow their
    block; each rank adds its share, until they are back at the owner. Blocks arrive in a different
    order on each rank, so sums round differently than under `Gather`; two runs agree.

    Args:
        k: [n, ...] this rank's keys; n may differ between ranks.
        metadata: This rank's columns [n, ...], which travel too.
        group: Process group.

    Raises:
        ValueError: on every rank, if dtypes or trailing shapes differ between ranks.
    """

    def __init__(self, k: Tensor, metadata: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
        self.group = group
        self.sizes, self.requires_grad = exchange_sizes(k, check_metadata(k, metadata), group)
        self.tensors, self.total, self.held = (k,), sum(self.sizes), len(k)
        self.rank, self.world_size, self.metadata = dist.get_rank(group), group.size(), metadata

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        names, totals = list(self.metadata), list[Tensor]()
        inputs = (*self.tensors, *self.metadata.values(), *columns)
        block_tensors = [value.detach().contiguous() for value in inputs]
        buffers: dict[tuple[str, int], list[Tensor]] = {}  # two sets of each kind, used in turn

        def receive_buffers(
            kind: str, turn: int, values: Sequence[Tensor], owner: int
        ) -> list[Tensor]:
            for value in values if (kind, turn % 2) not in buffers else ():
                largest = value.new_empty(max(self.sizes), *value.shape[1:])
                buffers.setdefault((kind, turn % 2), []).append(largest)
            size = self.sizes[owner % self.world_size]
            return [value[:size] for value in buffers.get((kind, turn % 2), [])]

        for step in range(self.world_size):
            owner, last = (self.rank + step) % self.world_size, step == self.world_size - 1
            arriving = [] if last else receive_buffers("block", step, block_tensors, owner + 1)
            # Totals of the ranks that processed this block before.
            merged = receive_buffers("totals", step, totals, owner) if step else []
            outgoing = totals if last else block_tensors + totals
            requests = self._exchange(outgoing, arriving + merged)
            metadata = dict(zip(names, block_tensors[1:], strict=False))
            block = KeyBlock(block_tensors[0], metadata, sum(self.sizes[:owner]))
            results = work(block, block_tensors[1 + len(names) :])
            for request in requests:
                request.wait()
            for merge, old, new in zip(merges, merged, results, strict=False):
                torch.logaddexp(old, new, out=old) if merge == "lse" else old.add_(new)
            totals, block_tensors = merged if step else results, arriving
        returned = receive_buffers("totals", self.world_size, totals, self.rank)
        for request in self._exchange(totals, returned):
            request.wait()
        return returned if self.world_size > 1 else totals

    def _exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[dist.Work]:
        """Start sending to the previous rank and receiving from the next one."""
        if self.world_size == 1:
            return []
        previous, following = (
            dist.get_global_rank(self.group, (self.rank + d) % self.world_size) for d in (-1, 1)
        )
        transfers = [
            dist.P2POp(operation, value, peer, self.group, tag)
            for operation, values, peer in (
                (dist.isend, outgoing, previous), (dist.irecv, incoming, following),
            )
            for tag, value in enumerate(values) if value.numel()
        ]  # fmt: skip
        return dist.batch_isend_irecv(transfers) if transfers else []


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and sums for inputs of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(like: Tensor) -> torch.autocast:
    """Return a context on `like`'s device in which an outer autocast does not round products."""
    return torch.autocast(like.device.type, enabled=False)


def add_rows(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Compute total[index] += values, in the same order on every run."""
    # On a GPU index_add adds atomically, in an order that changes; index_put does not.
    if total.device.type == "cpu":
        total.index_add_(0, index, values)
    else:
        total.index_put_((index,), values, accumulate=True)


def check_metadata(k: Tensor, metadata: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Check the metadata of keys, and return it.

    Raises:
        ValueError: if a column's length is not that of `k`.
    """
    for name, column in metadata.items():
        if len(column) != len(k):
            raise ValueError(f"metadata {name!r} must have {len(k)} entries; got {len(column)}")
    return metadata


def exchange_sizes(
    k: Tensor, metadata: Mapping[str, Tensor], group: dist.ProcessGroup
) -> tuple[list[int], bool]:
    """Return every rank's number of keys, and whether the keys of any rank require a gradient.

    A rank without rows may hold a constant, so ranks may differ in `requires_grad`.

    Raises:
        ValueError: on every rank, if trailing shapes or dtypes differ between ranks; a collective
            over different tensors would end the process.
    """
    kinds = [(name, t.dtype, t.shape[1:]) for name, t in (("k", k), *sorted(metadata.items()))]
    summary = [len(k), zlib.crc32(repr(kinds).encode()), k.requires_grad]
    local = torch.tensor(summary, dtype=torch.int64, device=k.device)
    summaries = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(summaries, local, group=group)
    sizes, checksums, requires_grad = torch.stack(summaries).T.tolist()
    if len(set(checksums)) > 1:
        raise ValueError("keys and metadata must have the same names, dtypes and trailing shapes "
                         f"on all ranks; this rank has {kinds}")  # fmt: skip
    return sizes, any(requires_grad)


def all_sum(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a tensor over ranks, in place and without gradient. Returns the tensor."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def global_row_indices(n: int, device: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    """Return int64 [n]: indices of this rank's n rows in the global batch, ranks in order."""
    rows = torch.empty(n, 0, device=device)
    sizes = [] if group is None else exchange_sizes(rows, {}, group)[0][: dist.get_rank(group)]
    return torch.arange(sum(sizes), sum(sizes) + n, device=device)
