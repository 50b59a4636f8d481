"""The interface of an objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.trainer.objectives.tables import SampleTable


@dataclass(frozen=True)
class Needs:
    """What an objective asks of a run.

    `taps`: outputs of the towers that it reads, a gradient going back (see `trainer/taps.py`).
    `teacher`: taps of a momentum tower, an average of the towers over steps, that come along as
    `teacher.TAP`, without gradient. `momentum`: of that average. `columns`: fields of the samples'
    json, as codes; `numbers`: as float32. `vectors`: of the samples, float32 [n, size], that no
    tower takes, by names that no field has. `tables`: what is kept of each sample of the data set:
    a name, and a row's first values.
    """

    taps: tuple[str, ...]
    columns: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    vectors: Mapping[str, VectorSettings] = field(default_factory=dict)
    teacher: tuple[str, ...] = ()
    momentum: float = 0.0
    tables: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Where an objective runs. `group`: the process group, None for one process. `step`: from 1.
    `epoch`: how often the data set was gone through before this step. `seed`: the run's."""

    group: dist.ProcessGroup | None
    step: int
    epoch: int = 0
    seed: int = 0

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else self.group.size()


Updates = Mapping[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """`value`: 0-dimensional; its *mean over ranks* is the loss of the global batch. `metrics`:
    0-dimensional tensors to show, the same on every rank. `updates`: asked after the backward pass
    of a step that is applied, for new values of the objective's buffers and of the batch's rows
    [n, F] of its tables, by name."""

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    updates: Callable[[], Updates] = dict


@dataclass(frozen=True)
class About:
    """What `gigabatch objectives` says of one. `passes`: matrix products of N x N x D a step, of
    which InfoNCE takes 4."""

    title: str
    papers: str
    formula: str
    passes: str
    use: str


class Objective(nn.Module):
    """A loss over the whole batch. Its parameters stay outside DeepSpeed: float32, replicated,
    with an optimizer group of their own."""

    needs: Needs
    about: ClassVar[About]

    @abstractmethod
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        """`outputs`: tap -> float32 [n, D], of tokens [n, T, D], of unit length: this rank's rows
        of the global batch (n may be 0), in rank order; of K captions a sample, text is
        [n * K, D]. `meta`: `sample` and the asked-for columns, int64 [n]; numbers, float32 [n];
        tables, float32 [n, F]; `text_mask`, bool, a row of each text; where rows may be missing,
        `image_present`, `text_present`, bool, a row of each."""

    @abstractmethod
    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        """`About.passes` as a number, for outputs of these shapes: N samples of width D."""

    def on_epoch(self, tables: Mapping[str, SampleTable], ctx: Context) -> Updates:
        """New values of buffers, worked out of whole tables before the first step of each epoch
        but the first. A collective."""
        return {}

    def of_samples(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What its tables say of samples, by name: from rows [m, F] of each table, floats [m],
        NaN for a sample that has not come yet."""
        return {}
