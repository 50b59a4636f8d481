"""State of an objective other than its parameters: tables of samples and a momentum tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gigabatch.trainer.distributed import World
from gigabatch.trainer.ema import frozen_copy
from gigabatch.trainer.objectives.tables import SampleTable

if TYPE_CHECKING:
    from gigabatch.trainer.objectives.base import Context, Objective
    from gigabatch.trainer.towers import Towers

# Prefixes and names of these tensors in a checkpoint.
TABLE, TEACHER, EPOCH = "table.", "teacher.", "state.epoch"


class ObjectiveState:
    """The tables and the momentum tower that an objective needs.

    Args:
        objective: The objective.
        sizes: Samples per source, in the order of the sample numbers.
        teacher: Copy of the initial towers in evaluation mode, or None.
        world: This process and its group.
    """

    def __init__(
        self, objective: Objective[Any], sizes: Sequence[int], teacher: Towers | None, world: World
    ) -> None:
        self.objective, self.world, self.samples = objective, world, sum(sizes)
        self.teacher, self.epoch = teacher, 0
        self.tables = {
            name: SampleTable(sizes, row, world) for name, row in objective.needs.tables.items()
        }

    def read(self, numbers: Tensor) -> dict[str, Tensor]:
        """Return each table's rows float32 [n, F] of sample numbers int64 [n].

        Collective: every rank must call it.
        """
        return {name: table.read(numbers) for name, table in self.tables.items()}

    def commit(self, updates: Mapping[str, Tensor], numbers: Tensor) -> None:
        """Write a step's new table rows and buffers. Collective: every rank must call it.

        Args:
            updates: Table name -> rows float32 [n, F]; buffer name -> its new value.
            numbers: Sample numbers int64 [n] of the rows.
        """
        for name, value in updates.items():
            if name in self.tables:
                self.tables[name].write(numbers, value)
            else:
                self.objective.get_buffer(name).copy_(value)

    def begin_epoch(self, ctx: Context) -> None:
        """Run the objective's `on_epoch` once in every epoch but the first.

        Collective: every rank must call it.
        """
        if ctx.epoch > self.epoch:
            self.epoch = ctx.epoch
            for name, value in self.objective.on_epoch(self.tables, ctx).items():
                self.objective.get_buffer(name).copy_(value)

    def save(self) -> dict[str, Tensor]:
        """Return all tables and the momentum tower; {} on ranks other than 0.

        Collective: every rank must call it.
        """
        tensors = {TABLE + name: table.gather() for name, table in self.tables.items()}
        tensors[EPOCH] = torch.tensor(self.epoch)
        if self.teacher is not None:
            for name, tensor in self.teacher.state_dict().items():
                tensors[TEACHER + name] = tensor.detach().to("cpu", copy=True).contiguous()
        return tensors if self.world.is_main else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `save`, at any world size."""
        self.epoch = int(state.get(EPOCH, 0))
        for name, table in self.tables.items():
            table.load(state[TABLE + name])
        if self.teacher is not None:
            names = [name for name in state if name.startswith(TEACHER)]
            self.teacher.load_state_dict({n.removeprefix(TEACHER): state[n] for n in names})


def open_state(
    objective: Objective[Any], sizes: Sequence[int], towers: Towers, world: World
) -> ObjectiveState:
    """Return an objective's state before the first step; `towers` must not be in an engine yet."""
    teacher = frozen_copy(towers) if objective.needs.teacher else None
    return ObjectiveState(objective, sizes, teacher, world)
