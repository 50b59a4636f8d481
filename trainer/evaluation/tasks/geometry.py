"""Task `geometry`: the geometry of the embeddings, and the gap between modalities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import SetTask

if TYPE_CHECKING:
    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.result import TaskResult


@register
class Geometry(SetTask):
    """Uniformity, alignment, tolerance, isotropy, effective rank, modality gap."""

    name = "geometry"
    summary = "uniformity, alignment, isotropy, effective rank, modality gap"

    label: str | None = None
    """JSON field of the classes for tolerance. Default: no tolerance."""
    tap: str = "head"
    """Tower output to read: head, encoder (before the head), or a module's path."""

    def measure(self, context: EvalContext) -> TaskResult:
        """Compute the metrics of all modalities and of every pair."""
        from gigabatch.trainer.evaluation.metrics.geometry import geometry_metrics
        from gigabatch.trainer.evaluation.result import TaskResult

        embedded = context.embed(context.config.modalities, self.tap)
        labels = context.field_codes(self.label, embedded) if self.label else None
        seed = context.config.run.seed
        metrics = geometry_metrics(embedded.outputs, labels, context.world, seed)
        return TaskResult(context.set_name, set_metrics=metrics)
