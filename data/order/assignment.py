"""Assign samples to micro-batches, and micro-batches to ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gigabatch.data.order.epoch_order import micro_batch_range, micro_batches_per_rank
from gigabatch.data.order.mixture import Mixture, batch_sample_numbers
from gigabatch.data.rng import I64


@dataclass(frozen=True)
class MicroBatchPlan:
    """One micro-batch to read.

    Attributes:
        step: The training step, from 1; 0 in an evaluation.
        number: The micro-batch's number in its step.
        real: False for padding, which repeats one sample.
        samples: The sample numbers.
    """

    step: int
    number: int
    real: bool
    samples: tuple[int, ...]


@dataclass(frozen=True)
class TrainPlans:
    """This rank's micro-batches of steps `first_step` to `last_step`, including padding."""

    mixture: Mixture
    global_size: int
    micro_size: int
    world_size: int
    rank: int
    first_step: int
    last_step: int

    @property
    def per_step(self) -> int:
        """Number of micro-batches of this rank in a step, including padding."""
        return micro_batches_per_rank(self.global_size // self.micro_size, self.world_size)

    def __iter__(self) -> Iterator[MicroBatchPlan]:
        for step in range(self.first_step, self.last_step + 1):
            samples = batch_sample_numbers(self.mixture, step, self.global_size)
            yield from _rank_plans(samples, self.micro_size, self.world_size, self.rank, step)


@dataclass(frozen=True)
class EvalPlans:
    """This rank's share of samples 0 to `count` - 1, in order, including padding.

    The last real micro-batch may be shorter than `micro_size`.
    """

    count: int
    micro_size: int
    world_size: int
    rank: int

    def __iter__(self) -> Iterator[MicroBatchPlan]:
        samples = np.arange(self.count)
        return _rank_plans(samples, self.micro_size, self.world_size, self.rank, step=0)


def _rank_plans(
    samples: I64, micro_size: int, world_size: int, rank: int, step: int
) -> Iterator[MicroBatchPlan]:
    """Yield the micro-batches of one rank, then padding up to the number that every rank has."""
    count = -(-len(samples) // micro_size)
    numbers = micro_batch_range(count, world_size, rank)
    for number in numbers:
        rows = samples[number * micro_size : (number + 1) * micro_size]
        yield MicroBatchPlan(step, number, True, tuple(rows.tolist()))
    for _ in range(micro_batches_per_rank(count, world_size) - len(numbers)):
        # Padding has one real sample: batches of size zero crash models and ZeRO.
        yield MicroBatchPlan(step, count, False, (int(samples[0]),))
