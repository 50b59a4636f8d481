"""Task `sample-state`: state of each training sample in the objective's tables.

Reads learned temperatures, running estimates, losses and clean probabilities (iSogCLR, PC2) from
the newest checkpoint. Nothing is embedded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import SetTask

if TYPE_CHECKING:
    from torch import Tensor

    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.result import TaskResult


@register
class SampleState(SetTask):
    """State that the objective keeps for each training sample: temperatures, losses, cleanness.

    --on names one of the run's training sources.
    """

    name = "sample-state"
    summary = "state of each training sample in the objective; --on is a training source"
    # Existing runs and studies have results under this name, the task's first.
    aliases = ("table",)
    tag = "table"

    label: str | None = None
    """JSON field; adds the mean for each of its values, and its correlation with frequency."""
    auc: str | None = None
    """JSON field of flags, such as whether a caption is correct; adds the AUC with which each value
    separates the two kinds."""

    def measure(self, context: EvalContext) -> TaskResult:
        """Describe the distribution of each value over the samples seen in training."""
        import torch

        from gigabatch.trainer.evaluation.labels import flags_of
        from gigabatch.trainer.evaluation.metrics.sample_state import (
            group_by_value,
            summarize_distribution,
        )
        from gigabatch.trainer.evaluation.metrics.statistics import auc
        from gigabatch.trainer.evaluation.result import TaskResult

        state = _sample_state(context)
        seen = ~torch.stack([values.isnan() for values in state.values()]).any(0)
        samples = seen.nonzero().flatten()
        if not len(samples):
            raise GigabatchError(
                f"sample-state: no sample of {context.set_argument} has been trained on yet. "
                "Train further."
            )
        values = {name: column[samples].double() for name, column in state.items()}
        metrics = {"seen": float(len(samples)), "samples": float(len(seen))}
        if self.label:
            labels = context.field_values(self.label)
            metrics |= group_by_value(values, [labels[i] for i in samples.tolist()], self.label)
        if self.auc:
            flags = flags_of(context.field_values(self.auc), self.auc, context.index)[samples]
            metrics |= {f"{name}/auc": auc(column, flags) for name, column in values.items()}
        return TaskResult(context.set_name, values, summarize_distribution, metrics, samples)


def _sample_state(context: EvalContext) -> dict[str, Tensor]:
    """Read the state of every sample of the set: name -> [N], NaN if not seen yet."""
    from gigabatch.trainer.inference import load_objective
    from gigabatch.trainer.inputs import open_train

    run, config = context.run, context.config
    data = open_train(config)
    if data.digest != run.data_digest():
        raise GigabatchError(
            f"{run.path}: the shards of {', '.join(data.names)} changed since training, so the "
            "run's tables cannot be read. Restore the shards."
        )
    digests = [index.digest for index in data.indexes]
    if context.index.digest not in digests:
        raise GigabatchError(
            f"sample-state: the run was not trained on {context.set_argument} but on "
            f"{', '.join(data.names)}. Name one of these with --on."
        )
    objective, tables = load_objective(run, context.step)
    source = digests.index(context.index.digest)
    # Tables contain all sources, one after the other.
    first = sum(data.sizes[:source])
    rows = {name: table[first : first + data.sizes[source]] for name, table in tables.items()}
    state = objective.sample_values(rows)
    if not state:
        raise GigabatchError(
            "sample-state: the run's objective has no state per sample; sogclr and noisy have it."
        )
    return state
