"""The interface of an objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Needs:
    """What an objective asks of a run. `taps`: towers whose outputs it reads. `columns`: fields
    of the samples' json that must come along."""

    taps: tuple[str, ...]
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """Where an objective runs. `group`: the process group, None for one process. `step`: from 1."""

    group: dist.ProcessGroup | None
    step: int


@dataclass(frozen=True)
class Loss:
    """`value`: 0-dimensional; its *mean over ranks* is the loss of the global batch. `metrics`:
    0-dimensional tensors to show, the same on every rank. `updates`: new values of the
    objective's buffers, by name, committed only if the step is."""

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    updates: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """A loss over the whole batch. Its parameters stay outside DeepSpeed: float32, replicated,
    with an optimizer group of their own."""

    needs: Needs

    @abstractmethod
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        """`outputs`: tap -> float32 [n, D], this rank's rows of the global batch (n may be 0), in
        rank order; of K captions a sample, text is [n * K, D]. `meta`: `sample` and the asked-for
        columns, int64 [n]; where rows may be missing, `image_present`, `text_present`, bool, a
        row of each."""
