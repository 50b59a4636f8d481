"""What an objective keeps beside its parameters: rows of samples, a momentum tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gigabatch.trainer.distributed import World
from gigabatch.trainer.ema import average_of
from gigabatch.trainer.objectives.tables import SampleTable

if TYPE_CHECKING:
    from gigabatch.trainer.objectives.base import Context, Objective
    from gigabatch.trainer.towers import Towers

TABLE, TEACHER, EPOCH = (
    "table.",
    "teacher.",
    "state.epoch",
)  # how their tensors are named in a checkpoint


class ObjectiveState:
    """The tables and the momentum tower that an objective needs.

    `sizes`: samples of each source, in the order of their numbers. `teacher`: a copy of the towers
    as they are at the start, in evaluation mode, or None.
    """

    def __init__(
        self, objective: Objective, sizes: Sequence[int], teacher: Towers | None, world: World
    ) -> None:
        self.objective, self.world, self.samples = objective, world, sum(sizes)
        self.teacher, self.epoch = teacher, 0
        self.tables = {
            name: SampleTable(sizes, row, world) for name, row in objective.needs.tables.items()
        }

    def read(self, numbers: Tensor) -> dict[str, Tensor]:
        """Each table's rows of these samples; int64 [n] -> float32 [n, F]. A collective."""
        return {name: table.read(numbers) for name, table in self.tables.items()}

    def commit(self, updates: Mapping[str, Tensor], numbers: Tensor) -> None:
        """Take over what a step, or an epoch, has found. A collective."""
        for name, value in updates.items():
            if name in self.tables:
                self.tables[name].write(numbers, value)
            else:
                self.objective.get_buffer(name).copy_(value)

    def begin_epoch(self, ctx: Context) -> None:
        """Let the objective see its tables, once in every epoch but the first. A collective."""
        if ctx.epoch > self.epoch:
            self.epoch = ctx.epoch
            for name, value in self.objective.on_epoch(self.tables, ctx).items():
                self.objective.get_buffer(name).copy_(value)

    def save(self) -> dict[str, Tensor]:
        """For a checkpoint: on rank 0 all tables, whole, and the teacher. A collective."""
        whole = {TABLE + name: table.gather() for name, table in self.tables.items()}
        whole[EPOCH] = torch.tensor(self.epoch)
        if self.teacher is not None:
            for name, tensor in self.teacher.state_dict().items():
                whole[TEACHER + name] = tensor.detach().to("cpu", copy=True).contiguous()
        return whole if self.world.is_main else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `save` gave, at any world size."""
        self.epoch = int(state.get(EPOCH, 0))
        for name, table in self.tables.items():
            table.load(state[TABLE + name])
        if self.teacher is not None:
            own = [n for n in state if n.startswith(TEACHER)]
            self.teacher.load_state_dict({n.removeprefix(TEACHER): state[n] for n in own})


def open_state(
    objective: Objective, sizes: Sequence[int], towers: Towers, world: World
) -> ObjectiveState:
    """What the objective needs, as it is before the first step; `towers` not yet in an engine."""
    teacher = average_of(towers) if objective.needs.teacher else None
    return ObjectiveState(objective, sizes, teacher, world)
