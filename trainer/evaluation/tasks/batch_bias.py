"""Task `batch-bias`: whether the batch is large enough for unbiased gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import SetTask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.metrics.batch_bias import Pairs
    from gigabatch.trainer.evaluation.result import TaskResult


@register
class BatchBias(SetTask):
    """Difference between the mean gradient of small batches and the gradient of all samples."""

    name = "batch-bias"
    summary = "bias of the gradients of small batches, to judge the batch size"

    batch: int | None = Field(None, ge=2)
    """Pairs per batch. Default: the run's batch.global_size."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Share of the batch's estimate in a sample's running estimate (SogCLR); 1: plain InfoNCE."""
    temperature: float | None = Field(None, gt=0)
    """Temperature of the loss. Default: the current one of the run's objective."""
    samples: int = Field(1024, ge=4)
    """Samples of the set, chosen by seeded random numbers, that represent all data."""
    rounds: int = Field(40, ge=2)
    """Passes over these samples whose gradients are averaged."""
    between: tuple[str, str] | None = None
    """Two of the run's modalities. Default: the first two of image, text, `towers.more`."""
    positives: str | None = None
    """JSON field; samples with equal values are not negatives of each other. `none`: all are.
    Default: the run's field."""

    def measure(self, context: EvalContext) -> TaskResult:
        """Average the gradients of batches over all rounds."""
        from gigabatch.trainer.evaluation.metrics.batch_bias import batch_bias
        from gigabatch.trainer.evaluation.result import TaskResult

        modalities = self.between or context.config.modalities[:2]
        if len(set(modalities)) < 2:
            raise GigabatchError(
                f"batch-bias needs two modalities, not {', '.join(modalities)}. Set between=[A,B]."
            )
        batch, samples = self._sizes(context)
        temperature = self.temperature or _run_temperature(context)
        pairs = self._pairs(context, modalities, samples)
        seed = context.config.run.seed
        metrics = batch_bias(pairs, batch, temperature, self.gamma, self.rounds, seed)
        metrics |= {"batch": batch, "samples": samples, "temperature": temperature}
        return TaskResult(context.set_name, set_metrics=metrics)

    def _sizes(self, context: EvalContext) -> tuple[int, int]:
        """Return (pairs per batch, samples); the second is a multiple of the first."""
        batch, total = self.batch or context.config.batch.global_size, len(context.index)
        samples = min(self.samples, total) // batch * batch
        if samples < 2 * batch:
            raise GigabatchError(
                f"batch-bias: batch={batch} needs at least {2 * batch} samples, two batches; there "
                f"are {min(self.samples, total)} (samples={self.samples}, {context.set_argument} "
                f"has {total}). Raise samples= or lower batch=."
            )
        return batch, samples

    def _pairs(self, context: EvalContext, modalities: Sequence[str], samples: int) -> Pairs:
        """Embed the set on all ranks and choose the pairs."""
        from gigabatch.kernels import gather_rows
        from gigabatch.trainer.evaluation.embedding import SAMPLE_COLUMN
        from gigabatch.trainer.evaluation.metrics.batch_bias import Pairs, choose_pairs

        positives = context.positives_field(self.positives)
        columns = [positives] if positives else []
        embedded = context.embed_for_comparison(modalities, "head", columns)
        parts = (
            *(embedded.outputs[m] for m in modalities),
            embedded.columns[positives or SAMPLE_COLUMN],
        )
        q, k, ids = (gather_rows(rows, context.world.group) for rows in parts)
        if q.shape[1] != k.shape[1]:
            raise GigabatchError(
                f"batch-bias: {' and '.join(modalities)} have vectors of different widths. Set "
                "between=[A,B] to two that the objective compares."
            )
        chosen = choose_pairs(samples, len(context.index), context.config.run.seed)
        return Pairs(q, k, ids).take(chosen.to(q.device))


def _run_temperature(context: EvalContext) -> float:
    """Return the objective's current temperature, or the mean of its samples' temperatures."""
    from gigabatch.trainer.inference import load_objective

    objective, tables = load_objective(context.run, context.step)
    temperature = objective.mean_temperature(tables)
    if temperature is None:
        raise GigabatchError(
            "batch-bias: the run's objective does not have exactly one temperature. Set "
            "temperature=."
        )
    return temperature
