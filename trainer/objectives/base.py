"""The interface of an objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.settings import ObjectiveSettings
from gigabatch.trainer.objectives.tables import SampleTable

S = TypeVar("S", bound=ObjectiveSettings)


@dataclass(frozen=True)
class Needs:
    """What an objective requires of a run.

    Attributes:
        taps: Tower outputs that it reads, with gradients (see `trainer/taps.py`).
        columns: Fields of the samples' json, encoded as int64.
        numeric_columns: Fields of the samples' json, as float32.
        vectors: The samples' vectors that no tower reads, float32 [n, size]; the names are
            distinct from those of json fields.
        teacher: Taps of the momentum tower, passed as `teacher.TAP` without gradient.
        momentum: Momentum of that tower's weights.
        tables: State of each sample of the data set: table name -> its initial row.
    """

    taps: tuple[str, ...]
    columns: tuple[str, ...] = ()
    numeric_columns: tuple[str, ...] = ()
    vectors: Mapping[str, VectorSettings] = field(default_factory=dict)
    teacher: tuple[str, ...] = ()
    momentum: float = 0.0
    tables: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Where an objective runs.

    Attributes:
        group: The process group; None for a single process.
        step: From 1.
        epoch: Completed passes over the data set.
        seed: The run's seed.
    """

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
    """The result of an objective on one rank.

    Attributes:
        value: 0-dimensional. Its mean over ranks is the loss of the global batch.
        metrics: 0-dimensional tensors to log, the same on every rank.
        updates: Called after the backward pass of a step that is applied. Returns new values of
            the objective's buffers, and of the batch's rows [n, F] of its tables, by name.
    """

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    updates: Callable[[], Updates] = dict


@dataclass(frozen=True)
class Card:
    """The documentation of an objective, shown by `gigabatch objectives` and in the docs.

    Attributes:
        title: One line.
        papers: Sources.
        formula: The loss.
        passes: Matrix products of N x N x D per step, as text; InfoNCE takes 4.
        use: When to choose it.
        aliases: Other names that users may look for.
    """

    title: str
    papers: str
    formula: str
    passes: str
    use: str
    aliases: tuple[str, ...] = ()


class Objective(nn.Module, Generic[S]):
    """A loss over the global batch, in one class: settings, documentation, forward pass, cost,
    reference formula and benchmark cases. `registry.register` makes it known.

    Its parameters stay outside DeepSpeed: float32, replicated, in an optimizer group of their own.
    """

    Settings: ClassVar[type[ObjectiveSettings]]
    card: ClassVar[Card]
    examples: ClassVar[Mapping[str, Example]] = {"": Example()}
    """What tests compare with `reference`, by a label."""
    benchmarks: ClassVar[Mapping[str, Benchmark]] = {"": Benchmark()}
    """What `gigabatch bench objectives` times, by a label: one for each setting that changes the
    work."""

    settings: S
    needs: Needs

    def __init__(self, settings: S) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def build(cls, settings: S, *, group: str | None = None, width: int = 0) -> Self:
        """Create the objective.

        Args:
            settings: Its settings.
            group: The column `data.group`: only samples with equal values are compared.
            width: Embedding dimension of the shared space.
        """
        return cls(settings)

    @abstractmethod
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        """Compute the loss of this rank's rows against the global batch.

        Args:
            outputs: Tap -> float32 [n, D], or [n, T, D] for tokens, of unit length: this rank's
                rows of the global batch in rank order; n may be 0. With K captions per sample,
                text is [n * K, D].
            meta: `sample` and the requested columns, int64 [n]; numeric columns, float32 [n];
                tables, float32 [n, F]; `text_mask`, bool, one row per text; where samples may lack
                a modality, `image_present` and `text_present`, bool, one per row.
            ctx: Process group, step, epoch and seed.
        """

    @abstractmethod
    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        """Return `card.passes` as a number for outputs of these shapes, N samples of width D."""

    @staticmethod
    @abstractmethod
    def reference(settings: Any, batch: ReferenceBatch) -> Value:
        """Compute the loss of the global batch from its formula in float64, with dense matrices
        and plain autograd. It shares no code with `forward`. `widths` are handled by the caller."""

    def on_epoch(self, tables: Mapping[str, SampleTable], ctx: Context) -> Updates:
        """Return new values of buffers, computed from full tables before the first step of each
        epoch but the first. A collective."""
        return {}

    def sample_values(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the tables say of samples, by name.

        Args:
            tables: Rows float32 [m, F] of each table.

        Returns:
            Floats [m], NaN for a sample that has not been seen.
        """
        return {}

    def mean_temperature(self, tables: Mapping[str, Tensor]) -> float | None:
        """Return the current temperature, averaged over samples; None without one."""
        return None


def reference_loss(kind: type[Objective[Any]], settings: Any, batch: ReferenceBatch) -> Value:
    """Return the reference of an objective, averaged over its Matryoshka `widths`."""
    widths = getattr(settings, "widths", ())
    if not widths:
        return kind.reference(settings, batch)
    values = []
    for width in widths:
        outputs = {
            tap: F.normalize(rows[..., :width], dim=-1) if width < rows.shape[-1] else rows
            for tap, rows in batch.outputs.items()
        }
        values.append(kind.reference(settings, replace(batch, outputs=outputs))[0])
    return sum(values[1:], start=values[0]) / len(values), None
