"""Tables with one row per sample of the data set, in host memory, sharded over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gigabatch.data.order.mixture import SAMPLE_BITS
from gigabatch.trainer.distributed import World


class SampleTable:
    """Table float32 [samples, F]; rank r of W holds the rows whose index is r modulo W.

    The stable number of a sample, `source << SAMPLE_BITS | index`, identifies its row.

    Args:
        sizes: Number of samples of each source.
        initial: Initial row [F] of every sample.
        world: Ranks that share the table.
    """

    def __init__(self, sizes: Sequence[int], initial: Sequence[float], world: World) -> None:
        self.world, self.width = world, len(initial)
        ends = torch.tensor([0, *sizes]).cumsum(0)
        self.first, self.count = ends[:-1], int(ends[-1])
        local_rows = len(range(world.rank, self.count, world.size))
        self.shard = torch.tensor(initial, dtype=torch.float32).repeat(local_rows, 1)

    def read(self, numbers: Tensor) -> Tensor:
        """Return the rows of this rank's samples. Collective: every rank must call it.

        Args:
            numbers: Sample numbers, int64 [n].

        Returns:
            float32 [n, F], on the device of `numbers`.
        """
        indices, start = self.world.concat(self._indices(numbers))
        local = indices % self.world.size == self.world.rank
        values = torch.zeros(len(indices), self.width, device=numbers.device)
        rows = self.shard[(indices[local] // self.world.size).cpu()]
        values[local] = rows.to(values.device)
        return self.world.sum(values)[start : start + len(numbers)]

    def write(self, numbers: Tensor, values: Tensor) -> None:
        """Write the rows of this rank's samples. Collective: every rank must call it.

        If the global batch holds a sample several times, the last row in its order is kept.

        Args:
            numbers: Sample numbers, int64 [n].
            values: New rows, floating [n, F].
        """
        indices, _ = self.world.concat(self._indices(numbers))
        rows, _ = self.world.concat(values.detach().float())
        indices, rows = indices.cpu(), rows.cpu()
        ordered, order = torch.sort(indices, stable=True)
        last = torch.ones_like(ordered, dtype=torch.bool)
        last[:-1] = ordered[1:] != ordered[:-1]
        keep = last & (ordered % self.world.size == self.world.rank)
        self.shard[ordered[keep] // self.world.size] = rows[order[keep]]

    def gather(self) -> Tensor:
        """Return all rows in order on rank 0, and [0, F] on other ranks.

        Collective: every rank must call it.
        """
        size, rank = self.world.size, self.world.rank
        if self.world.group is None:
            return self.shard.clone()
        device = self.world.device
        padded = torch.zeros(-(-self.count // size), self.width, device=device)
        padded[: len(self.shard)] = self.shard.to(device)
        parts = [torch.empty_like(padded) for _ in range(size)] if rank == 0 else None
        dist.gather(padded, parts, dst=0, group=self.world.group)
        if parts is None:
            return self.shard[:0]
        interleaved = torch.stack([part.cpu() for part in parts], 1)
        return interleaved.flatten(0, 1)[: self.count].clone()

    def load(self, rows: Tensor) -> None:
        """Replace this rank's rows by its share of all rows [samples, F]."""
        self.shard = rows[self.world.rank :: self.world.size].clone()

    def _indices(self, numbers: Tensor) -> Tensor:
        first = self.first.to(numbers.device)
        return first[numbers >> SAMPLE_BITS] + (numbers & ((1 << SAMPLE_BITS) - 1))
