"""Tags of metrics in TensorBoard and eval/*.json: flat names with slashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.metrics.statistics import MAX_SLICES, intervals, slices
from gigabatch.trainer.evaluation.result import TaskResult
from gigabatch.trainer.evaluation.task import SetTask


def metric_tags(
    task: SetTask, result: TaskResult, seed: int | None, groups: Tensor | None = None
) -> dict[str, float]:
    """Name the metrics of a result: `eval/SET/TASK/METRIC`, for retrieval `eval/SET/METRIC`.

    Args:
        task: The task.
        result: Its result.
        seed: Seed of the resampled queries for 95 % intervals, `.../low` and `.../high`; None adds
            no intervals.
        groups: Group of each query, int64 [N]; intervals then resample groups, not queries.
    """
    prefix = task.metric_prefix(result.set_name)
    metrics = {f"{prefix}{name}": value for name, value in result.metrics().items()}
    if seed is not None:
        metrics |= _interval_tags(prefix, result.query_values, result, seed, groups)
    return metrics


def slice_tags(
    task: SetTask, result: TaskResult, field: str, labels: Sequence[Any], seed: int | None,
    groups: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """Name the metrics of each slice: `eval/SET/[TASK/]FIELD=VALUE/METRIC`, and `count`.

    The candidates of a query are still those of the full set.

    Args:
        task: The task.
        result: Its result.
        field: The JSON field to slice by.
        labels: Value of the field for each sample of the set.
        seed: See `metric_tags`.
        groups: See `metric_tags`.

    Raises:
        GigabatchError: if the queries are not samples, or the field has too many values.
    """
    if result.sample_indices is None or not result.query_values:
        raise GigabatchError(
            f"--slice {field}: {task.name} has no metric of single samples. Remove --slice."
        )
    query_labels = [labels[index] for index in result.sample_indices.tolist()]
    split = slices(query_labels, result.query_values)
    split_groups = {} if groups is None else slices(query_labels, {"": groups})
    if len(split) > MAX_SLICES:
        raise GigabatchError(
            f"--slice {field}: the field has {len(split)} values, more than {MAX_SLICES}. Slice by "
            "a field with fewer values."
        )
    metrics: dict[str, float] = {}
    for label, values in split.items():
        prefix = f"{task.metric_prefix(result.set_name)}{field}={label}/"
        count = len(next(iter(values.values())))
        of_slice = result.summarize(values) | {"count": float(count)}
        metrics |= {f"{prefix}{name}": metric for name, metric in of_slice.items()}
        if seed is not None:
            slice_groups = split_groups[label][""] if split_groups else None
            metrics |= _interval_tags(prefix, values, result, seed, slice_groups)
    return metrics


def _interval_tags(
    prefix: str, values: Mapping[str, Tensor], result: TaskResult, seed: int,
    groups: Tensor | None,
) -> dict[str, float]:  # fmt: skip
    """Compute and name the interval ends of metrics that vary with the queries."""
    if not values:
        return {}
    ends = intervals(values, result.summarize, seed, groups=groups)
    constant = ("candidates", *result.set_metrics)
    return {
        f"{prefix}{name}/{end}": value
        for name, pair in ends.items()
        if name not in constant
        for end, value in zip(("low", "high"), pair, strict=True)
    }
