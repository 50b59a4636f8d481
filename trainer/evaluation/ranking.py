"""Figures of a ranking, exact: hit@k, recall@k, precision@k, MRR, MAP, NDCG@k, R-precision, ranks.

Each follows from the ranks of a query's right answers alone, and these from a count: how many
wrong keys score no less. So no list is sorted, and memory is a block of rows.

**Ties count against us.** Of keys with equal scores, wrong ones stand first, then right ones by
rising grade: every figure is the least that any order of the ties could give. A right answer whose
score is NaN stands last; a wrong one, first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.score_rows import Scorer, blocks

FEW = 16
"""Right answers a query up to which they are counted one by one."""
RANK = "rank"
"""The rank of a query's best right answer, from 1; its mean and median are told, not its name."""


@dataclass(frozen=True)
class Relevance:
    """The right answers of Q queries: `keys[start[i] : stop[i]]` with `grades`, all above 0.

    `start`, `stop`: int64 [Q]. `keys`: int64 [M], numbers among all keys. `grades`: float64 [M].
    `own`: int64 [Q], a key that is left out of the query's list (itself, say), -1 for none.
    """

    start: Tensor
    stop: Tensor
    keys: Tensor
    grades: Tensor
    own: Tensor | None = None

    @staticmethod
    def by_id(query_ids: Tensor, key_ids: Tensor, own: Tensor | None = None) -> Relevance:
        """Right is a key with the query's id, [Q] against [N]; a query's `own` key is not counted
        among them. O(N) memory, however large a group."""
        order = key_ids.argsort(stable=True)
        held = key_ids[order]
        query_ids = query_ids.contiguous()
        start = torch.searchsorted(held, query_ids)
        stop = torch.searchsorted(held, query_ids, right=True)
        grades = torch.ones(len(order), dtype=torch.float64, device=order.device)
        return Relevance(start, stop, order, grades, own)

    @staticmethod
    def by_pairs(
        rows: Tensor, keys: Tensor, grades: Tensor, queries: int, own: Tensor | None = None
    ) -> Relevance:
        """From M judged pairs: query `rows` [M] and key `keys` [M] with `grades` [M]. A grade of 0
        or less means wrong. A pair may come once."""
        right = grades > 0
        rows, keys, grades = rows[right], keys[right], grades[right].double()
        order = rows.argsort(stable=True)
        counts = torch.bincount(rows, minlength=queries)
        stop = counts.cumsum(0)
        return Relevance(stop - counts, stop, keys[order], grades[order], own)

    def part(self, queries: slice) -> Relevance:
        """That of some of the queries."""
        own = None if self.own is None else self.own[queries]
        return Relevance(self.start[queries], self.stop[queries], self.keys, self.grades, own)

    def to(self, device: torch.device) -> Relevance:
        own = None if self.own is None else self.own.to(device)
        start, stop = self.start.to(device), self.stop.to(device)
        return Relevance(start, stop, self.keys.to(device), self.grades.to(device), own)

    def padded(self, part: slice) -> tuple[Tensor, Tensor]:
        """(keys int64 [b, R], grades [b, R]) of some queries; -1 and -1 fill short rows."""
        start, stop = self.start[part], self.stop[part]
        widest = int((stop - start).max()) if len(start) else 0
        at = start.unsqueeze(1) + torch.arange(widest, device=start.device)
        real = at < stop.unsqueeze(1)
        at = torch.where(real, at, 0)
        keys = self.keys[at] if len(self.keys) else at
        grades = self.grades[at] if len(self.keys) else at.double()
        if self.own is not None:
            real &= keys != self.own[part].unsqueeze(1)
        return keys.where(real, -1), grades.where(real, -1.0)


@torch.no_grad()
def rank_queries(
    score: Scorer, relevance: Relevance, keys: int, ks: Sequence[int], ndcg: bool = True
) -> dict[str, Tensor]:
    """For each query its figures, float64 [Q]: `hit@k`, `recall@k`, `precision@k`, and with `ndcg`
    `ndcg@k`, for each of `ks`; `mrr`, `map`, `r_precision`, `rank`. NaN for a query without a
    right answer: leave it out of means."""
    found: dict[str, list[Tensor]] = {}
    for part in blocks(len(relevance.start), keys):
        ranks, grades = _ranks(score(part), relevance, part)
        for name, values in _figures(ranks, grades, ks, ndcg).items():
            found.setdefault(name, []).append(values)
    if not found:
        none = torch.empty(0, 1, dtype=torch.float64, device=relevance.start.device)
        return _figures(none, none, ks, ndcg)
    return {name: torch.cat(values) for name, values in found.items()}


def _ranks(scores: Tensor, relevance: Relevance, part: slice) -> tuple[Tensor, Tensor]:
    """Ranks of right answers, float64 [b, R], best first, and their grades; inf and -1 fill."""
    right, grades = relevance.padded(part)
    top = _gathered(scores, right).nan_to_num(nan=-torch.inf, posinf=torch.inf)
    top = torch.where(grades > 0, top, torch.inf)
    # From the worst place to the best: by rising score; of equal ones the higher grade is worse
    # off. What fills short rows comes after all.
    order = grades.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, top.gather(1, order).argsort(dim=1, stable=True))
    top, grades = top.gather(1, order).contiguous(), grades.gather(1, order)
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf)
    # Right answers and the own key are not wrong ones.
    left_out = right
    if relevance.own is not None:
        left_out = torch.cat([right, relevance.own[part].unsqueeze(1)], 1)
    wrong_before = _not_below(scores, top)
    wrong_before -= _not_below(_gathered(scores, left_out), top, left_out >= 0)
    place = (grades > 0).sum(1, keepdim=True) - torch.arange(top.shape[1], device=scores.device)
    ranks = torch.where(grades > 0, (wrong_before + place).double(), torch.inf)
    order = ranks.argsort(dim=1, stable=True)
    return ranks.gather(1, order), grades.gather(1, order)


def _gathered(scores: Tensor, keys: Tensor) -> Tensor:
    """Scores of the keys [b, R] of each row; anything where a key is -1."""
    return scores.gather(1, keys.clamp(min=0)) if keys.shape[1] else scores[:, :0]


def _not_below(scores: Tensor, top: Tensor, counted: Tensor | None = None) -> Tensor:
    """For each of `top` [b, R], rising, how many of `scores` [b, n] are at least as high: int64
    [b, R]. `counted`: bool [b, n], which scores count."""
    rows, width = top.shape
    if width <= FEW:  # so many comparisons are quicker than a search
        counts = []
        for i in range(width):
            reached = scores >= top[:, i : i + 1]
            counts.append((reached if counted is None else reached & counted).sum(1))
        return torch.stack(counts, 1) if counts else top.long()
    beaten = torch.searchsorted(top, scores, right=True)  # how many of `top` a key reaches
    if counted is not None:
        beaten = torch.where(counted, beaten, 0)
    beaten += torch.arange(rows, device=scores.device).unsqueeze(1) * (width + 1)
    held = torch.bincount(beaten.flatten(), minlength=rows * (width + 1)).view(rows, width + 1)
    return held.flip(1).cumsum(1).flip(1)[:, 1:]


def _figures(ranks: Tensor, grades: Tensor, ks: Sequence[int], ndcg: bool) -> dict[str, Tensor]:
    """From ranks [b, R], best first, filled with inf, and grades."""
    ranks = torch.nn.functional.pad(ranks, (0, max(0, 1 - ranks.shape[1])), value=torch.inf)
    grades = torch.nn.functional.pad(grades, (0, ranks.shape[1] - grades.shape[1]), value=-1.0)
    real = grades > 0
    total = real.sum(1).double()
    known = torch.where(total > 0, total, torch.nan)  # 0 / NaN: no figure without a right answer
    lost = torch.where(total > 0, 0.0, torch.nan)
    out: dict[str, Tensor] = {}
    for k in ks:
        inside = (ranks <= k).sum(1).double()
        out[f"hit@{k}"] = (inside > 0).double() + lost
        out[f"recall@{k}"] = inside / known
        out[f"precision@{k}"] = inside / k + lost
        if ndcg:
            out[f"ndcg@{k}"] = _dcg(ranks, grades, k) / _ideal(grades, k) + lost
    place = torch.arange(1, ranks.shape[1] + 1, device=ranks.device, dtype=torch.float64)
    out["mrr"] = 1 / ranks[:, 0] + lost
    out["map"] = (place / ranks).sum(1) / known
    out["r_precision"] = (ranks <= total.unsqueeze(1)).sum(1) / known
    out[RANK] = ranks[:, 0] + lost
    return out


def _dcg(ranks: Tensor, grades: Tensor, k: int) -> Tensor:
    gain = grades.clamp(min=0) / torch.log2(ranks + 1)  # inf: no gain
    return torch.where(ranks <= k, gain, 0.0).sum(1)


def _ideal(grades: Tensor, k: int) -> Tensor:
    best = grades.clamp(min=0).sort(dim=1, descending=True).values[:, :k]
    place = torch.arange(1, best.shape[1] + 1, device=best.device, dtype=torch.float64)
    return (best / torch.log2(place + 1)).sum(1)


def summary(figures: Mapping[str, Tensor], prefix: str = "") -> dict[str, float]:
    """Means over the queries that have a right answer; of ranks the mean and the (lower) median.

    Raises GigabatchError where no query has one.
    """
    out: dict[str, float] = {}
    for name, values in figures.items():
        known = values[~values.isnan()]
        if not len(known):
            raise GigabatchError(f"{prefix}{name}: no query has a right answer among the keys.")
        if name == RANK:
            out[f"{prefix}mean_rank"] = float(known.mean())
            out[f"{prefix}median_rank"] = float(known.median())
        else:
            out[f"{prefix}{name}"] = float(known.mean())
    return out
