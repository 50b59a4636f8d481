"""Which samples each micro-batch of a rank holds: the order, cut and dealt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gigabatch.data.order.epoch_order import deal, rounds
from gigabatch.data.order.mixture import Mixture, batch_numbers


@dataclass(frozen=True)
class Plan:
    """One micro-batch to be read: its name, and its sample numbers."""

    step: int
    number: int
    real: bool
    samples: tuple[int, ...]


@dataclass(frozen=True)
class TrainPlans:
    """This rank's micro-batches of steps `first_step` to `last_step`, dummies included."""

    mixture: Mixture
    global_size: int
    micro_size: int
    world_size: int
    rank: int
    first_step: int
    last_step: int

    @property
    def per_step(self) -> int:
        return rounds(self.global_size // self.micro_size, self.world_size)

    def __iter__(self) -> Iterator[Plan]:
        for step in range(self.first_step, self.last_step + 1):
            samples = batch_numbers(self.mixture, step, self.global_size)
            yield from _deal(samples, self.micro_size, self.world_size, self.rank, step)


@dataclass(frozen=True)
class EvalPlans:
    """This rank's share of samples 0 to `count` - 1, in order, dummies included; the last real
    micro-batch may be short."""

    count: int
    micro_size: int
    world_size: int
    rank: int

    def __iter__(self) -> Iterator[Plan]:
        samples = np.arange(self.count)
        return _deal(samples, self.micro_size, self.world_size, self.rank, step=0)


def _deal(
    samples: np.ndarray, micro_size: int, world_size: int, rank: int, step: int
) -> Iterator[Plan]:
    count = -(-len(samples) // micro_size)
    mine = deal(count, world_size, rank)
    for j in mine:
        rows = samples[j * micro_size : (j + 1) * micro_size]
        yield Plan(step, j, True, tuple(rows.tolist()))
    for _ in range(rounds(count, world_size) - len(mine)):
        # One real sample: batches of size zero crash models and ZeRO.
        yield Plan(step, count, False, (int(samples[0]),))
