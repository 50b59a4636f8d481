"""Result of an evaluation task: values per query, and metrics computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gigabatch.trainer.evaluation.metrics.ranking import summarize
from gigabatch.trainer.evaluation.metrics.statistics import Summarize


@dataclass(frozen=True)
class TaskResult:
    """Values that a task measured on a set, the same on every rank.

    Attributes:
        set_name: Name of the set in metric tags.
        query_values: Name -> float64 [N], one value per query, in order.
        summarize: Computes metrics from `query_values`, or from the rows of some queries.
        set_metrics: Metrics that are not computed from values of single queries.
        sample_indices: int64 [N], the sample of each query; None if queries are not samples.
    """

    set_name: str
    query_values: Mapping[str, Tensor] = field(default_factory=dict)
    summarize: Summarize = summarize
    set_metrics: Mapping[str, float] = field(default_factory=dict)
    sample_indices: Tensor | None = None

    def metrics(self) -> dict[str, float]:
        """Return all metrics by name."""
        summary = self.summarize(self.query_values) if self.query_values else {}
        return {**summary, **self.set_metrics}
