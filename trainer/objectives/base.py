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
        vectors: Vectors of the samples that no tower reads, float32 [n, size]; their names are
            distinct from those of json fields.
        teacher: Taps of the momentum tower, passed as `teacher.TAP` without gradient.
        momentum: Momentum of the momentum tower's weights.
        tables: State of each sample of the data set: table name -> initial row.
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
    """The process group, progress and seed of a run.

    Attributes:
        group: Process group; None for a single process.
        step: Number of the step, from 1.
        epoch: Number of completed passes over the data set.
        seed: Seed of the run.
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
        updates: Function that is called after the backward pass of each applied step. Returns, by
            name, new values of the objective's buffers and of the batch's rows [n, F] of tables.
    """

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    updates: Callable[[], Updates] = dict


@dataclass(frozen=True)
class Card:
    """The documentation of an objective, shown by `gigabatch objectives` and in the docs.

    Attributes:
        title: Summary in one line.
        papers: Sources.
        formula: Formula of the loss.
        passes: Number of N x N x D matrix products per step, as text; InfoNCE takes 4.
        use: Data and goals that it suits.
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
    reference formula and benchmark cases. `registry.register` adds it to the registry.

    Its parameters stay outside DeepSpeed: float32, replicated, in a separate optimizer group.
    """

    Settings: ClassVar[type[ObjectiveSettings]]
    card: ClassVar[Card]
    examples: ClassVar[Mapping[str, Example]] = {"": Example()}
    """Settings under which tests compare `forward` with `reference`, by label."""
    benchmarks: ClassVar[Mapping[str, Benchmark]] = {"": Benchmark()}
    """Settings that `gigabatch bench objectives` times, by label: one for each setting that changes
    the cost."""

    settings: S
    needs: Needs

    def __init__(self, settings: S) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def build(cls, settings: S, *, group: str | None = None, width: int = 0) -> Self:
        """Create the objective.

        Args:
            settings: The objective's settings.
            group: Name of the column in `data.group`; only samples of one group are compared.
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
        """Return new values of buffers, computed from the full tables.

        It is called before the first step of every epoch except the first. Collective: every rank
        must call it.
        """
        return {}

    def sample_values(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return per-sample values computed from the tables, by name.

        Args:
            tables: Table name -> rows, float32 [m, F].

        Returns:
            Name -> floating [m]; NaN for a sample that has not been seen.
        """
        return {}

    def mean_temperature(self, tables: Mapping[str, Tensor]) -> float | None:
        """Return the current temperature, averaged over samples, or None if there is none."""
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
