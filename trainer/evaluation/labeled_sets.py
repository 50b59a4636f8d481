"""Embeddings of one modality with labels: the measured set, and the training set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gigabatch.data.shards.index import Index
from gigabatch.trainer.evaluation.context import EvalContext
from gigabatch.trainer.evaluation.embedding import SAMPLE_COLUMN, Embedded
from gigabatch.trainer.evaluation.labels import codes_of, numbers_of
from gigabatch.trainer.evaluation.task import LabeledTask


@dataclass(frozen=True)
class LabeledSet:
    """This rank's rows of a set with labels.

    Attributes:
        features: float32 [n, D].
        embedded: The embeddings from which the features were taken.
        label: JSON field of the label.
        values: Value of the field for every sample of the set.
        index: The set.
    """

    features: Tensor
    embedded: Embedded
    label: str
    values: Sequence[Any]
    index: Index

    def classes(self) -> Tensor:
        """Return int64 [n]: codes of the labels."""
        return self.rows(codes_of(self.values))

    def targets(self) -> Tensor:
        """Return float64 [n]: the labels as numbers.

        Raises:
            GigabatchError: if a label is not a number.
        """
        return self.rows(numbers_of(self.values, self.label, self.index))

    def rows(self, of_set: Tensor) -> Tensor:
        """Return this rank's rows [n] of values of all samples [N]."""
        indices = self.embedded.columns[SAMPLE_COLUMN]
        return of_set.to(indices.device)[indices]


def read_labeled_sets(
    context: EvalContext, task: LabeledTask
) -> tuple[LabeledSet, LabeledSet, bool]:
    """Embed the training set and the measured set.

    Returns:
        (training set, measured set, whether both are the same set).
    """
    modality = task.modality or context.config.modalities[0]

    def read(index: Index) -> LabeledSet:
        embedded = context.embed([modality], task.tap, task.width, index)
        values = context.field_values(task.label, index)
        return LabeledSet(embedded.outputs[modality], embedded, task.label, values, index)

    test = read(context.index)
    index = context.open_set(task.train or context.config.data.train[0].path)
    if index.digest == context.index.digest:
        return test, test, True
    return read(index), test, False
