"""Statistics of per-query values: AUC, order accuracy, rank variance, slices, intervals.

All are exact and take O(N log N) time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key, uniforms

Summarize = Callable[[Mapping[str, Tensor]], dict[str, float]]
"""Turns per-query values, name -> [N], into metrics."""
RESAMPLES = 1000
MAX_SLICES = 1000
"""Values of a field up to which metrics are reported for each value."""


def auc(scores: Tensor, positive: Tensor) -> float:
    """Compute the area under the ROC curve exactly.

    It is the probability that a positive scores above a negative, ties counting half (Mann and
    Whitney's U over its maximum).

    Args:
        scores: [N].
        positive: bool [N].

    Raises:
        GigabatchError: if there are no positives, no negatives, or a NaN score.
    """
    positives, negatives = scores[positive].double(), scores[~positive].double()
    if not len(positives) or not len(negatives):
        raise GigabatchError(
            f"an AUC needs positive and negative samples; there are {len(positives)} positive and "
            f"{len(negatives)} negative ones."
        )
    if scores.isnan().any():
        raise GigabatchError("an AUC needs finite scores; some are NaN.")
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives)
    not_above = torch.searchsorted(ordered, positives, right=True)
    twice_wins = int((below + not_above).sum())  # an integer, because a tie adds 1 to it
    return twice_wins / (2 * len(positives) * len(negatives))


def order_accuracy(correct: Tensor, changed: Tensor) -> Tensor:
    """Compare the score of a correct order with those of changed orders (TeminAL).

    Args:
        correct: [N].
        changed: [N] or [N, K].

    Returns:
        float64 [N]: 1 if the correct order scores above all changed ones, else 0; ties and NaN
        give 0.
    """
    others = changed.reshape(len(correct), -1)
    return (correct.unsqueeze(1) > others).all(1).double()


def rank_variance(ranks: Tensor) -> dict[str, Tensor]:
    """Compute how much the rank of each item varies over languages.

    The mean of the variances is MRV (1-to-K); its published code averages the standard
    deviations instead. Both divide by the number of languages.

    Args:
        ranks: [languages, N].

    Returns:
        `rank_variance` and `rank_std`, float64 [N].
    """
    variance = ranks.double().var(0, correction=0)
    return {"rank_variance": variance, "rank_std": variance.sqrt()}


def slices(labels: Sequence[object], values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split per-query values by the label of each query; slices are in order of label."""
    names = np.array([str(label) for label in labels])
    split = {}
    for name in sorted(set(names.tolist())):
        rows = torch.from_numpy(np.flatnonzero(names == name))
        split[name] = {key: column[rows.to(column.device)] for key, column in values.items()}
    return split


def intervals(
    values: Mapping[str, Tensor],
    summarize: Summarize,
    seed: int,
    level: float = 0.95,
    groups: Tensor | None = None,
) -> dict[str, tuple[float, float]]:
    """Compute percentile bootstrap intervals (Efron 1979) of metrics.

    The resamples are a function of (seed, N), so that two models on one set can be compared.

    Args:
        values: Name -> [N], one value a query.
        summarize: Turns values of queries into metrics.
        seed: Seed of the resamples.
        level: Coverage.
        groups: int64 [N]; queries of one group are drawn together (the cluster bootstrap). N is
            then the number of groups.

    Returns:
        Metric -> (low, high).
    """
    on_cpu = {name: column.cpu() for name, column in values.items()}
    size = len(next(iter(on_cpu.values())))
    members = None if groups is None else _members(groups)
    draws = []
    for number in range(RESAMPLES):
        rows = _resample(size if members is None else len(members), seed, number)
        if members is not None:
            rows = torch.cat([members[group] for group in rows.tolist()])
        draws.append(summarize({name: column[rows] for name, column in on_cpu.items()}))
    ends = [(1 - level) / 2, (1 + level) / 2]
    # A resample may lack a metric, for example if it holds no triggered sample.
    names = dict.fromkeys(name for draw in draws for name in draw)
    return {
        name: tuple(np.quantile([draw[name] for draw in draws if name in draw], ends).tolist())
        for name in names
    }


def _members(groups: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of each group, int64."""
    counts = groups.unique(return_counts=True)[1]
    members: tuple[Tensor, ...] = groups.argsort(stable=True).split(counts.tolist())
    return members


def _resample(size: int, seed: int, number: int) -> Tensor:
    """Draw int64 [size], uniform over 0 to size - 1."""
    coarse, fine = uniforms(key(seed, "bootstrap", number), size, 2).T.astype(np.float64)
    # One float32 uniform has 24 bits: too coarse for a fair choice among many queries.
    return torch.from_numpy(((coarse + fine * 2.0**-24) * size).astype(np.int64))
