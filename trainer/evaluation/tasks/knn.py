"""Task `knn`: classification by nearest neighbors among training samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import LabeledTask

if TYPE_CHECKING:
    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.result import TaskResult


@register
class NearestNeighbors(LabeledTask):
    """Classification by the nearest training samples.

    If the training set is also the measured set, a sample is not its own neighbor.
    """

    name = "knn"
    summary = "classification by nearest neighbors among training samples"

    k: int = Field(200, ge=1)
    """Number of neighbors that vote."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the votes: a neighbor votes with weight exp(cosine / temperature)."""

    def measure(self, context: EvalContext) -> TaskResult:
        """Classify every sample by the votes of its neighbors."""
        from gigabatch.trainer.evaluation.labeled_sets import read_labeled_sets
        from gigabatch.trainer.evaluation.metrics.classification import (
            nearest_neighbors,
            summarize_classification,
        )
        from gigabatch.trainer.evaluation.result import TaskResult

        train, test, same_set = read_labeled_sets(context, self)
        values = nearest_neighbors(
            test.features, test.classes(), train.features, train.classes(), context.world, self.k,
            self.temperature, leave_out=same_set,
        )  # fmt: skip
        indices = context.sample_indices(test.embedded)
        return TaskResult(
            context.set_name, values, summarize_classification, sample_indices=indices
        )
