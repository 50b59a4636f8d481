"""Task `zero-shot`: classification by prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import SetTask, Texts

if TYPE_CHECKING:
    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.result import TaskResult


@register
class ZeroShot(SetTask):
    """Classification of images, or of a different modality, by prompts."""

    name = "zero-shot"
    summary = "classification by prompts that name the classes"

    label: str
    """JSON field of the class."""
    classes: Path | None = None
    """A .json file that maps values of `label` to names, or a text file whose line n names the
    value n. Default: the values are the names."""
    templates: Annotated[Texts, Field(min_length=1)] = ("{}",)
    """Prompt or list of prompts, with {} for the name; a class is the mean of its prompts."""
    modality: str | None = None
    """Modality to classify. Default: the run's first that is not text."""

    def measure(self, context: EvalContext) -> TaskResult:
        """Classify every sample by its most similar class."""
        from gigabatch.trainer.evaluation.captions import captioned_modality
        from gigabatch.trainer.evaluation.embedding import SAMPLE_COLUMN, embed_texts
        from gigabatch.trainer.evaluation.labels import named_classes
        from gigabatch.trainer.evaluation.metrics.classification import (
            class_vectors,
            summarize_classification,
            zero_shot,
        )
        from gigabatch.trainer.evaluation.result import TaskResult

        for template in self.templates:
            if "{}" not in template:
                raise GigabatchError(
                    f"templates: {template!r} has no {{}} for the name of the class. Add it."
                )
        modality = captioned_modality(context, self.modality)
        names, labels = named_classes(context.field_values(self.label), self.classes, self.label)
        prompts = [template.replace("{}", name) for name in names for template in self.templates]
        world = context.world
        texts = embed_texts(context.towers, prompts, context.config, context.run, world)
        vectors = texts.gathered(world.group).values
        embedded = context.embed([modality])
        own_labels = labels.to(vectors.device)[embedded.columns[SAMPLE_COLUMN]]
        classes = class_vectors(vectors, len(self.templates))
        return TaskResult(
            context.set_name,
            zero_shot(embedded.outputs[modality], own_labels, classes, world),
            summarize_classification,
            {"classes": float(len(names)), "templates": float(len(self.templates))},
            context.sample_indices(embedded),
        )
