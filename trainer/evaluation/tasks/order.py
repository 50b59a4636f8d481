"""Task `order`: captions against the same captions with their order changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import SetTask, Texts

if TYPE_CHECKING:
    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.result import TaskResult


@register
class Order(SetTask):
    """Share of samples that score their caption above captions with a changed order."""

    name = "order"
    summary = "correct captions score above captions with a changed order"

    against: Annotated[Texts, Field(min_length=1)]
    """JSON field of changed captions, or a list of fields."""
    modality: str | None = None
    """Modality that the captions describe. Default: the run's first that is not text."""
    captions: str | None = None
    """Location of the correct caption: txt, or a JSON field. Default: as in the run."""

    def measure(self, context: EvalContext) -> TaskResult:
        """Score every sample with its correct and its changed captions."""
        import torch

        from gigabatch.kernels import gather_rows
        from gigabatch.trainer.evaluation.captions import captioned_modality, embed_captions
        from gigabatch.trainer.evaluation.metrics.score_rows import score_pairs
        from gigabatch.trainer.evaluation.metrics.statistics import order_accuracy
        from gigabatch.trainer.evaluation.result import TaskResult

        modality = captioned_modality(context, self.modality)
        embedded = embed_captions(context, modality, self.captions)
        queries, changed = embedded.rows(modality), []
        for field in self.against:
            other = embed_captions(context, modality, field, base=embedded)
            changed.append(score_pairs(queries, other.rows("text")))
        correct = score_pairs(queries, embedded.rows("text"))
        accuracy = order_accuracy(correct, torch.stack(changed, 1))
        values = {"order_accuracy": gather_rows(accuracy, context.world.group)}
        return TaskResult(context.set_name, values, sample_indices=context.sample_indices(embedded))
