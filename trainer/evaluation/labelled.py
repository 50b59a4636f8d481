"""Features of one modality with a field of the samples' json: a set, and the set whose labels are
known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gigabatch.data.shards.index import Index
from gigabatch.trainer.evaluation.embedding import NAMED_BY_NUMBER, Embedded, Reading
from gigabatch.trainer.evaluation.labels import codes_of, numbers_of
from gigabatch.trainer.evaluation.task import Subject


class Asked(Protocol):
    """What the tasks that read two sets are told."""

    @property
    def label(self) -> str: ...
    @property
    def train(self) -> str | None: ...
    @property
    def modality(self) -> str | None: ...
    @property
    def tap(self) -> str: ...
    @property
    def width(self) -> int | None: ...


@dataclass(frozen=True)
class Labelled:
    """This rank's rows of a set. `x`: float32 [n, D]. `found`: what was embedded, of which samples.
    `values`: the field `label` of every sample of the set."""

    x: Tensor
    found: Embedded
    label: str
    values: Sequence[Any]
    index: Index

    def classes(self) -> Tensor:
        """int64 [n]: codes of the values."""
        return self.rows(codes_of(self.values))

    def numbers(self) -> Tensor:
        """float64 [n]: the values, which must be numbers."""
        return self.rows(numbers_of(self.values, self.label, self.index))

    def rows(self, of_set: Tensor) -> Tensor:
        """This rank's [n] of what every sample of the set has, [N]."""
        number = self.found.columns[NAMED_BY_NUMBER]
        return of_set.to(number.device)[number]


def read_labelled(subject: Subject, wanted: Asked) -> tuple[Labelled, Labelled, bool]:
    """(the training set, this one, whether they are one set)."""
    modality = wanted.modality or subject.config.modalities[0]
    reading = Reading(modalities=[modality], width=wanted.width)

    def read(index: Index) -> Labelled:
        found = subject.embed(reading, wanted.tap, index)
        values = subject.values(wanted.label, index)
        return Labelled(found.taps[modality], found, wanted.label, values, index)

    test = read(subject.index)
    index = subject.open(wanted.train or subject.config.data.train[0].path)
    if index.digest == subject.index.digest:
        return test, test, True
    return read(index), test, False
