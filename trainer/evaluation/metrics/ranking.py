"""Exact ranking metrics: hit@k, recall@k, precision@k, MRR, MAP, NDCG@k, R-precision, ranks.

Every metric is computed from the ranks of a query's relevant items. A rank is found by counting the
irrelevant keys that score at least as high. So no list is sorted, and memory is one block of rows.

Ties count against the model. Among keys with equal scores, irrelevant ones come first, then
relevant ones by rising grade, so each metric is the lowest that any order of the ties could give.
A relevant item with score NaN comes last; an irrelevant one with score NaN comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.metrics.score_rows import Scorer, tracked_blocks

MAX_DIRECT = 16
"""Maximum number of relevant items per query that are compared one by one; above it, a search is
used."""
RANK = "rank"
"""Key of the rank, from 1, of a query's best relevant item; summarized as `mean_rank` and
`median_rank`."""


@dataclass(frozen=True)
class Relevance:
    """Relevant items of Q queries: query i has `keys[start[i] : stop[i]]`.

    Attributes:
        start: int64 [Q].
        stop: int64 [Q].
        keys: Indices of keys, int64 [M].
        grades: float64 [M], above 0.
        excluded: Key removed from each query's list, such as the query itself, int64 [Q]; -1 for
            none.
    """

    start: Tensor
    stop: Tensor
    keys: Tensor
    grades: Tensor
    excluded: Tensor | None = None

    @staticmethod
    def by_id(query_ids: Tensor, key_ids: Tensor, excluded: Tensor | None = None) -> Relevance:
        """Build relevance from ids: a key is relevant to the queries with the same id.

        Memory is O(N), even if many keys share an id.

        Args:
            query_ids: int64 [Q].
            key_ids: int64 [N].
            excluded: int64 [Q], see the class.
        """
        order = key_ids.argsort(stable=True)
        sorted_ids = key_ids[order]
        query_ids = query_ids.contiguous()
        start = torch.searchsorted(sorted_ids, query_ids)
        stop = torch.searchsorted(sorted_ids, query_ids, right=True)
        grades = torch.ones(len(order), dtype=torch.float64, device=order.device)
        return Relevance(start, stop, order, grades, excluded)

    @staticmethod
    def by_pairs(
        rows: Tensor,
        keys: Tensor,
        grades: Tensor,
        num_queries: int,
        excluded: Tensor | None = None,
    ) -> Relevance:
        """Build relevance from M judged pairs without duplicates.

        Args:
            rows: Query of each pair, int64 [M].
            keys: Key of each pair, int64 [M].
            grades: Grade of each pair, [M]; 0 or less means irrelevant.
            num_queries: Q.
            excluded: int64 [Q], see the class.
        """
        relevant = grades > 0
        rows, keys, grades = rows[relevant], keys[relevant], grades[relevant].double()
        order = rows.argsort(stable=True)
        counts = torch.bincount(rows, minlength=num_queries)
        stop = counts.cumsum(0)
        return Relevance(stop - counts, stop, keys[order], grades[order], excluded)

    def part(self, queries: slice) -> Relevance:
        """Return the relevance of some queries."""
        excluded = None if self.excluded is None else self.excluded[queries]
        return Relevance(self.start[queries], self.stop[queries], self.keys, self.grades, excluded)

    def to(self, device: torch.device) -> Relevance:
        """Copy to a device."""
        excluded = None if self.excluded is None else self.excluded.to(device)
        start, stop = self.start.to(device), self.stop.to(device)
        return Relevance(start, stop, self.keys.to(device), self.grades.to(device), excluded)

    def padded(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return the relevant keys of some queries as a matrix.

        Returns:
            Keys int64 [b, R] and grades [b, R], both padded with -1.
        """
        start, stop = self.start[part], self.stop[part]
        widest = int((stop - start).max()) if len(start) else 0
        positions = start.unsqueeze(1) + torch.arange(widest, device=start.device)
        real = positions < stop.unsqueeze(1)
        positions = torch.where(real, positions, 0)
        keys = self.keys[positions] if len(self.keys) else positions
        grades = self.grades[positions] if len(self.keys) else positions.double()
        if self.excluded is not None:
            real &= keys != self.excluded[part].unsqueeze(1)
        return keys.where(real, -1), grades.where(real, -1.0)


@torch.no_grad()
def rank_queries(
    score: Scorer, relevance: Relevance, num_keys: int, ks: Sequence[int], ndcg: bool = True
) -> dict[str, Tensor]:
    """Compute the ranking metrics of every query.

    Args:
        score: Scorer of Q queries and N keys.
        relevance: Relevant items of the Q queries.
        num_keys: N.
        ks: Cutoffs k.
        ndcg: Also compute `ndcg@k`.

    Returns:
        float64 [Q] for each of `hit@k`, `recall@k`, `precision@k`, `ndcg@k`, `mrr`, `map`,
        `r_precision` and `rank`; NaN for a query without a relevant item.
    """
    parts: dict[str, list[Tensor]] = {}
    for part in tracked_blocks("ranking queries", len(relevance.start), num_keys):
        ranks, grades = _ranks(score(part), relevance, part)
        for name, values in _metrics(ranks, grades, ks, ndcg).items():
            parts.setdefault(name, []).append(values)
    if not parts:
        none = torch.empty(0, 1, dtype=torch.float64, device=relevance.start.device)
        return _metrics(none, none, ks, ndcg)
    return {name: torch.cat(values) for name, values in parts.items()}


def _ranks(scores: Tensor, relevance: Relevance, part: slice) -> tuple[Tensor, Tensor]:
    """Return ranks and grades of relevant items, float64 [b, R], best first; padding: inf, -1."""
    relevant, grades = relevance.padded(part)
    top = _take(scores, relevant).nan_to_num(nan=-torch.inf, posinf=torch.inf)
    top = torch.where(grades > 0, top, torch.inf)
    # Sort from the worst rank to the best: by rising score, then by falling grade; padding is last.
    order = grades.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, top.gather(1, order).argsort(dim=1, stable=True))
    top, grades = top.gather(1, order).contiguous(), grades.gather(1, order)
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf)
    # Count all keys, then subtract the relevant and excluded ones.
    not_counted = relevant
    if relevance.excluded is not None:
        not_counted = torch.cat([relevant, relevance.excluded[part].unsqueeze(1)], 1)
    irrelevant_before = _count_not_below(scores, top)
    irrelevant_before -= _count_not_below(_take(scores, not_counted), top, not_counted >= 0)
    place = (grades > 0).sum(1, keepdim=True) - torch.arange(top.shape[1], device=scores.device)
    ranks = torch.where(grades > 0, (irrelevant_before + place).double(), torch.inf)
    order = ranks.argsort(dim=1, stable=True)
    return ranks.gather(1, order), grades.gather(1, order)


def _take(scores: Tensor, keys: Tensor) -> Tensor:
    """Return the scores of the keys [b, R] of each row; undefined where a key is -1."""
    return scores.gather(1, keys.clamp(min=0)) if keys.shape[1] else scores[:, :0]


def _count_not_below(scores: Tensor, top: Tensor, counted: Tensor | None = None) -> Tensor:
    """Count, for each of `top` [b, R], the `scores` [b, n] that are at least as high.

    `top` rises along a row. `counted` bool [b, n] selects scores. Returns int64 [b, R].
    """
    rows, width = top.shape
    if width <= MAX_DIRECT:  # for so few items, comparisons are faster than a search
        counts = []
        for i in range(width):
            reached = scores >= top[:, i : i + 1]
            counts.append((reached if counted is None else reached & counted).sum(1))
        return torch.stack(counts, 1) if counts else top.long()
    beaten = torch.searchsorted(top, scores, right=True)  # number of `top` that a score reaches
    if counted is not None:
        beaten = torch.where(counted, beaten, 0)
    beaten += torch.arange(rows, device=scores.device).unsqueeze(1) * (width + 1)
    histogram = torch.bincount(beaten.flatten(), minlength=rows * (width + 1))
    return histogram.view(rows, width + 1).flip(1).cumsum(1).flip(1)[:, 1:]


def _metrics(ranks: Tensor, grades: Tensor, ks: Sequence[int], ndcg: bool) -> dict[str, Tensor]:
    """Compute all metrics from ranks [b, R], best first, padded with inf, and grades."""
    ranks = torch.nn.functional.pad(ranks, (0, max(0, 1 - ranks.shape[1])), value=torch.inf)
    grades = torch.nn.functional.pad(grades, (0, ranks.shape[1] - grades.shape[1]), value=-1.0)
    real = grades > 0
    total = real.sum(1).double()
    # Dividing by NaN, or adding it, marks queries without a relevant item.
    divisor = torch.where(total > 0, total, torch.nan)
    missing = torch.where(total > 0, 0.0, torch.nan)
    out: dict[str, Tensor] = {}
    for k in ks:
        inside = (ranks <= k).sum(1).double()
        out[f"hit@{k}"] = (inside > 0).double() + missing
        out[f"recall@{k}"] = inside / divisor
        out[f"precision@{k}"] = inside / k + missing
        if ndcg:
            out[f"ndcg@{k}"] = _dcg(ranks, grades, k) / _ideal_dcg(grades, k) + missing
    place = torch.arange(1, ranks.shape[1] + 1, device=ranks.device, dtype=torch.float64)
    out["mrr"] = 1 / ranks[:, 0] + missing
    out["map"] = (place / ranks).sum(1) / divisor
    out["r_precision"] = (ranks <= total.unsqueeze(1)).sum(1) / divisor
    out[RANK] = ranks[:, 0] + missing
    return out


def _dcg(ranks: Tensor, grades: Tensor, k: int) -> Tensor:
    gain = grades.clamp(min=0) / torch.log2(ranks + 1)  # 0 at padding, whose rank is inf
    return torch.where(ranks <= k, gain, 0.0).sum(1)


def _ideal_dcg(grades: Tensor, k: int) -> Tensor:
    best = grades.clamp(min=0).sort(dim=1, descending=True).values[:, :k]
    place = torch.arange(1, best.shape[1] + 1, device=best.device, dtype=torch.float64)
    return (best / torch.log2(place + 1)).sum(1)


def summarize(values: Mapping[str, Tensor], prefix: str = "") -> dict[str, float]:
    """Average per-query values over the queries that have a relevant item.

    Args:
        values: Name -> float64 [N]; NaN marks a query to leave out.
        prefix: Prepended to every name.

    Returns:
        Means by name; for `rank` the mean and the lower median.

    Raises:
        GigabatchError: if no query has a relevant item.
    """
    out: dict[str, float] = {}
    for name, per_query in values.items():
        valid = per_query[~per_query.isnan()]
        if not len(valid):
            raise GigabatchError(
                f"{prefix}{name}: no query has a relevant item among the keys; check positives=."
            )
        if name == RANK:
            out[f"{prefix}mean_rank"] = float(valid.mean())
            out[f"{prefix}median_rank"] = float(valid.median())
        else:
            out[f"{prefix}{name}"] = float(valid.mean())
    return out
