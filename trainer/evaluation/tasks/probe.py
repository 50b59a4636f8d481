"""Task `probe`: a linear model on frozen embeddings, of classes or of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import LabeledTask

if TYPE_CHECKING:
    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.labeled_sets import LabeledSet
    from gigabatch.trainer.evaluation.result import TaskResult


@register
class Probe(LabeledTask):
    """A linear model on frozen embeddings, fitted on the training set."""

    name = "probe"
    summary = "linear model on frozen embeddings, of classes or of numbers"

    label: str
    """JSON field of the class, or of the number."""
    kind: Literal["classification", "regression"] = "classification"
    """classification: logistic regression of classes; regression: ridge regression of numbers."""

    def measure(self, context: EvalContext) -> TaskResult:
        """Fit on the training set and predict the label of every sample.

        Raises:
            GigabatchError: if both sets are the same.
        """
        from gigabatch.trainer.evaluation.labeled_sets import read_labeled_sets

        train, test, same_set = read_labeled_sets(context, self)
        if same_set:
            raise GigabatchError(
                f"probe: {context.set_argument} is also the training set of the probe. "
                "Name a different set with train=SET or --on SET."
            )
        if self.kind == "regression":
            return _regression(context, train, test)
        return _classification(context, train, test)


def _classification(context: EvalContext, train: LabeledSet, test: LabeledSet) -> TaskResult:
    from gigabatch.trainer.evaluation.metrics.classification import summarize_classification
    from gigabatch.trainer.evaluation.metrics.linear_probe import linear_probe
    from gigabatch.trainer.evaluation.result import TaskResult

    values, l2 = linear_probe(
        (train.features, train.classes()), (test.features, test.classes()), context.world,
        context.config.run.seed,
    )  # fmt: skip
    indices = context.sample_indices(test.embedded)
    return TaskResult(context.set_name, values, summarize_classification, {"l2": l2}, indices)


def _regression(context: EvalContext, train: LabeledSet, test: LabeledSet) -> TaskResult:
    from gigabatch.trainer.evaluation.metrics.ridge_probe import (
        regression_probe,
        summarize_regression,
    )
    from gigabatch.trainer.evaluation.result import TaskResult

    values, l2 = regression_probe(
        (train.features, train.targets()), (test.features, test.targets()), context.world,
        context.config.run.seed,
    )  # fmt: skip
    indices = context.sample_indices(test.embedded)
    return TaskResult(context.set_name, values, summarize_regression, {"l2": l2}, indices)
