"""Task `trigger`: backdoors, samples with a trigger that are classified as a target class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.tasks.knn import NearestNeighbors

if TYPE_CHECKING:
    from torch import Tensor

    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.result import TaskResult


@register
class Trigger(NearestNeighbors):
    """A backdoor (BLTO): whether triggered samples are classified as the target class."""

    name = "trigger"
    summary = "backdoors: share of samples with a trigger that are classified as the target"

    target: int | str
    """Class at which the attack aims: a value of `label`."""
    triggered: str
    """JSON field that is 1 if a sample has the trigger, else 0."""

    def measure(self, context: EvalContext) -> TaskResult:
        """Classify every sample as `knn` does; for triggered samples, the target is correct."""
        import torch

        from gigabatch.data.decode.ids import code_of
        from gigabatch.kernels import gather_rows
        from gigabatch.trainer.evaluation.labeled_sets import read_labeled_sets
        from gigabatch.trainer.evaluation.labels import flags_of
        from gigabatch.trainer.evaluation.metrics.backdoor import (
            attack_values,
            collapse,
            summarize_attack,
        )
        from gigabatch.trainer.evaluation.metrics.classification import nearest_neighbors
        from gigabatch.trainer.evaluation.result import TaskResult

        train, test, same_set = read_labeled_sets(context, self)
        flags = flags_of(context.field_values(self.triggered), self.triggered, context.index)
        target, labels, train_labels = code_of(self.target), test.classes(), train.classes()
        triggered, world = test.rows(flags), context.world
        self._require_samples(context, bool(world.sum((train_labels == target).sum())), flags)
        # top1 of a triggered sample then means that it was classified as the target.
        expected = torch.where(triggered, target, labels)
        neighbors = nearest_neighbors(
            test.features, expected, train.features, train_labels, world, self.k, self.temperature,
            leave_out=same_set,
        )  # fmt: skip
        all_labels, all_triggered = (gather_rows(rows, world.group) for rows in (labels, triggered))
        values = attack_values(neighbors, all_labels, target, all_triggered)
        metrics = collapse(test.features, triggered, world) | {"triggered": float(flags.sum())}
        indices = context.sample_indices(test.embedded)
        return TaskResult(context.set_name, values, summarize_attack, metrics, indices)

    def _require_samples(self, context: EvalContext, has_target: bool, flags: Tensor) -> None:
        """Check that the target class and both kinds of samples exist."""
        if not has_target:
            raise GigabatchError(
                f"trigger: target={self.target}: no training sample has {self.label} = "
                f"{self.target!r}. Set target to a value of that field."
            )
        count = int(flags.sum())
        if min(count, len(flags) - count) < 2:
            raise GigabatchError(
                f"trigger: {context.set_argument}: {self.triggered} marks {count} of {len(flags)} "
                "samples; at least two with a trigger and two without are needed. Name a different "
                "set or field."
            )
