"""Statistics of per-query values: AUC, order accuracy, rank variance, slices, intervals.

All are exact and take O(N log N) time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigabatch.data.decode.ids import code_of, is_missing
from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key, uniforms
from gigabatch.data.shards.json_columns import canonical_json
from gigabatch.trainer.evaluation.progress import tracked

Summarize = Callable[[Mapping[str, Tensor]], dict[str, float]]
"""Function from per-query values, name -> [N], to metrics."""
RESAMPLES = 1000
MAX_SLICES = 1000
"""Maximum number of field values for which slices are reported."""


def auc(scores: Tensor, positive: Tensor) -> float:
    """Compute the area under the ROC curve exactly.

    It is the probability that a positive scores above a negative, where ties count half: Mann and
    Whitney's U divided by its maximum.

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
    """Compute the variance and standard deviation of each item's rank over languages.

    The mean of the variances is MRV (1-to-K); its published code averages the standard deviations
    instead. Variances divide by the number of languages.

    Args:
        ranks: [languages, N].

    Returns:
        `rank_variance` and `rank_std`, float64 [N].
    """
    variance = ranks.double().var(0, correction=0)
    return {"rank_variance": variance, "rank_std": variance.sqrt()}


def slice_names(labels: Sequence[Any]) -> list[str]:
    """Return the name of the slice of each label, its text; `None` for a missing one.

    Equal values, such as 7 and 7.0, have one name. Different values with one text, such as 1 and
    "1", are named by their JSON text.
    """
    codes = [None if is_missing(label) else code_of(label) for label in labels]
    of_code: dict[int | None, Any] = {}
    for code, label in zip(codes, labels, strict=True):
        shorter = code not in of_code or len(str(label)) < len(str(of_code[code]))
        if shorter:  # "7" rather than "7.0", in any order of the samples
            of_code[code] = None if code is None else label
    count = Counter(map(str, of_code.values()))
    names = {
        code: str(label) if count[str(label)] == 1 else canonical_json(label)
        for code, label in of_code.items()
    }
    return [names[code] for code in codes]


def slices(labels: Sequence[object], values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split per-query values by the label of each query; slices are sorted by label."""
    names = np.array(slice_names(labels))
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

    The resamples depend only on (seed, N), so that models on the same set can be compared.

    Args:
        values: Name -> [N], one value per query.
        summarize: Computes metrics from values of queries.
        seed: Seed of the resamples.
        level: Coverage.
        groups: Group of each query, int64 [N]; queries of a group are drawn together (cluster
            bootstrap). The resamples then depend on the number of groups instead of N.

    Returns:
        Metric -> (low, high).
    """
    on_cpu = {name: column.cpu() for name, column in values.items()}
    size = len(next(iter(on_cpu.values())))
    members = None if groups is None else _members(groups)
    draws = []
    for number in tracked("resampling queries", range(RESAMPLES), RESAMPLES):
        rows = _resample(size if members is None else len(members), seed, number)
        if members is not None:
            rows = torch.cat([members[group] for group in rows.tolist()])
        draws.append(summarize({name: column[rows] for name, column in on_cpu.items()}))
    ends = [(1 - level) / 2, (1 + level) / 2]
    # A resample may lack a metric, for example if it contains no triggered sample.
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
