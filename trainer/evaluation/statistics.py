"""Figures of figures: AUC, spread over languages, slices, intervals; all exact, O(N log N)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key, uniforms

Tell = Callable[[Mapping[str, Tensor]], dict[str, float]]
DRAWS = 1000


def auc(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive scores above a negative, ties counting half (Mann and Whitney's U
    over its maximum; the area under the ROC curve). `scores` [N], `positive` bool [N].

    Raises GigabatchError where either kind is missing or a score is NaN.
    """
    right, wrong = scores[positive].double(), scores[~positive].double()
    if not len(right) or not len(wrong):
        raise GigabatchError(
            f"an AUC needs samples of both kinds; there are {len(right)} positive ones and "
            f"{len(wrong)} negative ones."
        )
    if scores.isnan().any():
        raise GigabatchError("an AUC needs scores that are numbers; some are NaN.")
    held = wrong.sort().values
    below = torch.searchsorted(held, right)
    not_above = torch.searchsorted(held, right, right=True)
    wins = int((below + not_above).sum())  # twice their number, a whole one
    return wins / (2 * len(right) * len(wrong))


def order_accuracy(right: Tensor, wrong: Tensor) -> Tensor:
    """For each anchor, 1 where its right order scores above all wrong ones, else 0, ties and NaN
    counting against us. `right` [N], `wrong` [N] or [N, K]; float64 [N]. (TeminAL, number 36.)"""
    others = wrong.reshape(len(right), -1)
    return (right.unsqueeze(1) > others).all(1).double()


def rank_variance(ranks: Tensor) -> dict[str, Tensor]:
    """How far the rank of the right answer wanders over languages: `rank_variance` and
    `rank_std` of each instance, float64 [N], of `ranks` [languages, N].

    MRV (1-to-K, number 45) is the mean of the variances; its published code averages the standard
    deviations. Both divide by the number of languages.
    """
    spread = ranks.double().var(0, correction=0)
    return {"rank_variance": spread, "rank_std": spread.sqrt()}


def slices(values: Sequence[object], figures: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Figures cut by the value that each query has, values in the order of their names."""
    names = np.array([str(value) for value in values])
    cut = {}
    for name in sorted(set(names.tolist())):
        rows = torch.from_numpy(np.flatnonzero(names == name))
        cut[name] = {figure: each[rows.to(each.device)] for figure, each in figures.items()}
    return cut


def intervals(
    figures: Mapping[str, Tensor],
    tell: Tell,
    seed: int,
    level: float = 0.95,
    groups: Tensor | None = None,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals (Efron 1979) of whatever `tell` makes of the figures of N
    queries. The resamples are a function of (seed, N), so that two models on one set can be
    compared. `groups`: int64 [N]; queries of one value are not independent, and are drawn together
    (the cluster bootstrap), N being the number of values."""
    held = {name: values.cpu() for name, values in figures.items()}
    size = len(next(iter(held.values())))
    members = None if groups is None else _members(groups)
    drawn = []
    for number in range(DRAWS):
        rows = _resample(size if members is None else len(members), seed, number)
        if members is not None:
            rows = torch.cat([members[group] for group in rows.tolist()])
        drawn.append(tell({name: values[rows] for name, values in held.items()}))
    ends = [(1 - level) / 2, (1 + level) / 2]
    # A draw may hold no query that some figure is of (no triggered sample, say).
    names = dict.fromkeys(name for each in drawn for name in each)
    return {
        name: tuple(np.quantile([each[name] for each in drawn if name in each], ends).tolist())
        for name in names
    }


def _members(groups: Tensor) -> tuple[Tensor, ...]:
    """The rows of each value, int64 each."""
    counts = groups.unique(return_counts=True)[1]
    return groups.argsort(stable=True).split(counts.tolist())


def _resample(size: int, seed: int, number: int) -> Tensor:
    """int64 [size], each of 0 to size - 1 as likely."""
    coarse, fine = uniforms(key(seed, "bootstrap", number), size, 2).T.astype(np.float64)
    return torch.from_numpy(((coarse + fine * 2.0**-24) * size).astype(np.int64))
