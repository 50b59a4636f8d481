"""Statistics of per-sample state: quantiles, means by field value, correlation with counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gigabatch.trainer.evaluation.metrics.statistics import MAX_SLICES, slice_names

QUANTILES = {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}


def summarize_distribution(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute `NAME/mean`, `/min`, `/max` and quantiles, interpolated between samples."""
    metrics: dict[str, float] = {}
    for name, column in values.items():
        array = column.numpy()
        quantiles = np.quantile(array, list(QUANTILES.values())).tolist()
        summary = {"mean": array.mean(), "min": array.min(), "max": array.max()}
        summary |= dict(zip(QUANTILES, quantiles, strict=True))
        metrics |= {f"{name}/{what}": float(value) for what, value in summary.items()}
    return metrics


def group_by_value(
    values: Mapping[str, Tensor], labels: Sequence[Any], field: str
) -> dict[str, float]:
    """Average values by the label of each sample.

    Args:
        values: Name -> [N] on the CPU.
        labels: Value of a JSON field for each sample.
        field: Name of the field.

    Returns:
        `FIELD/values`: number of labels. For up to `MAX_SLICES` labels, `FIELD=LABEL/NAME`, the
        mean, and `FIELD=LABEL/count`. `NAME/log_frequency_correlation`: Pearson's correlation over
        labels of that mean with the logarithm of the count, if both vary.
    """
    names, group = np.unique(slice_names(labels), return_inverse=True)
    counts = np.bincount(group)
    list_all = len(names) <= MAX_SLICES
    metrics: dict[str, float] = {f"{field}/values": float(len(names))}
    if list_all:
        metrics |= {f"{field}={v}/count": float(n) for v, n in zip(names, counts, strict=True)}
    for name, column in values.items():
        means = np.bincount(group, column.numpy()) / counts
        if list_all:
            metrics |= {f"{field}={v}/{name}": float(m) for v, m in zip(names, means, strict=True)}
        if len(set(counts.tolist())) > 1 and float(np.ptp(means)) > 0:
            correlation = np.corrcoef(means, np.log(counts))[0, 1]
            metrics[f"{name}/log_frequency_correlation"] = float(correlation)
    return metrics
