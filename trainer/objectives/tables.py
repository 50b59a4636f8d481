"""A row of numbers for each sample of the data set, on the host, dealt out over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gigabatch.data.order.mixture import SAMPLE_BITS
from gigabatch.trainer.distributed import World


class SampleTable:
    """float32 [samples, F], of which rank r of W holds every row whose place is r modulo W.

    Rows are found by the stable number of a sample, `source << NUMBER_BITS | place`. `sizes`:
    samples of each source. `initial`: a row as it is before anything is written.
    """

    def __init__(self, sizes: Sequence[int], initial: Sequence[float], world: World) -> None:
        self.world, self.width = world, len(initial)
        ends = torch.tensor([0, *sizes]).cumsum(0)
        self.first, self.count = ends[:-1], int(ends[-1])
        held = len(range(world.rank, self.count, world.size))
        self.shard = torch.tensor(initial, dtype=torch.float32).repeat(held, 1)

    def read(self, numbers: Tensor) -> Tensor:
        """float32 [n, F], on the numbers' device. A collective: each rank asks for its own."""
        places, start = self.world.concat(self._places(numbers))
        mine = places % self.world.size == self.world.rank
        found = torch.zeros(len(places), self.width, device=numbers.device)
        rows = self.shard[(places[mine] // self.world.size).cpu()]
        found[mine] = rows.to(found.device)
        return self.world.sum(found)[start : start + len(numbers)]

    def write(self, numbers: Tensor, values: Tensor) -> None:
        """Put float32 [n, F] in their places. Of a sample that the batch holds twice the last
        counts, in the order of the global batch. A collective."""
        places, _ = self.world.concat(self._places(numbers))
        rows, _ = self.world.concat(values.detach().float())
        places, rows = places.cpu(), rows.cpu()
        ordered, order = torch.sort(places, stable=True)
        last = torch.ones_like(ordered, dtype=torch.bool)
        last[:-1] = ordered[1:] != ordered[:-1]
        keep = last & (ordered % self.world.size == self.world.rank)
        self.shard[ordered[keep] // self.world.size] = rows[order[keep]]

    def whole(self) -> Tensor:
        """On rank 0 all rows, in the order of their places; elsewhere [0, F]. A collective."""
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
        dealt = torch.stack([part.cpu() for part in parts], 1)
        return dealt.flatten(0, 1)[: self.count].clone()

    def load(self, whole: Tensor) -> None:
        """Take this rank's part of all rows."""
        self.shard = whole[self.world.rank :: self.world.size].clone()

    def _places(self, numbers: Tensor) -> Tensor:
        first = self.first.to(numbers.device)
        return first[numbers >> SAMPLE_BITS] + (numbers & ((1 << SAMPLE_BITS) - 1))
