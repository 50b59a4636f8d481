"""Dense numpy references of ranking metrics: full score matrices and sorted lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def ranked(scores: np.ndarray, grades: np.ndarray, excluded: int = -1) -> list[int]:
    """Sort keys by descending score; of equal scores, the lower grade comes first."""
    keys = [j for j in range(len(scores)) if j != excluded]

    def sort_key(j: int) -> Any:
        score = float(scores[j])
        if math.isnan(score):
            score = math.inf if grades[j] <= 0 else -math.inf
        return (-score, grades[j])

    return sorted(keys, key=sort_key)


def ranking_metrics(
    scores: np.ndarray, grades: np.ndarray, ks: Sequence[int], excluded: np.ndarray | None = None
) -> dict[str, list[float]]:
    """Compute every metric of every query; `scores` and `grades` are [Q, N]."""
    out: dict[str, list[float]] = {}
    for i, (row, grade) in enumerate(zip(scores, grades, strict=True)):
        grade = np.maximum(grade, 0.0)
        order = ranked(row, grade, -1 if excluded is None else int(excluded[i]))
        gains = [float(grade[j]) for j in order]
        relevant = sum(g > 0 for g in gains)
        for name, value in list_metrics(gains, relevant, ks).items():
            out.setdefault(name, []).append(value if relevant else math.nan)
    return out


def list_metrics(gains: list[float], relevant: int, ks: Sequence[int]) -> dict[str, float]:
    """Compute the metrics of one sorted list."""

    def dcg(values: list[float], k: int) -> float:
        return sum(g / math.log2(i + 2) for i, g in enumerate(values[:k]))

    def relevant_in_top(k: int) -> int:
        return sum(g > 0 for g in gains[:k])

    out: dict[str, float] = {}
    for k in ks:
        out[f"hit@{k}"] = float(relevant_in_top(k) > 0)
        out[f"recall@{k}"] = relevant_in_top(k) / max(relevant, 1)
        out[f"precision@{k}"] = relevant_in_top(k) / k
        ideal = dcg(sorted(gains, reverse=True), k)
        out[f"ndcg@{k}"] = dcg(gains, k) / ideal if ideal else 0.0
    ranks = [rank for rank, g in enumerate(gains, start=1) if g > 0]
    out["mrr"] = 1 / ranks[0] if ranks else 0.0
    out["map"] = sum(relevant_in_top(rank) / rank for rank in ranks) / max(relevant, 1)
    out["r_precision"] = relevant_in_top(relevant) / max(relevant, 1)
    out["rank"] = float(ranks[0]) if ranks else math.nan
    return out


def maxsim(q: np.ndarray, q_mask: np.ndarray, k: np.ndarray, k_mask: np.ndarray) -> np.ndarray:
    """Compute MaxSim scores [Q, N]: means over query tokens of their largest product with a key."""
    out = np.empty((len(q), len(k)))
    for i, j in np.ndindex(*out.shape):
        queries, keys = q[i][q_mask[i]].astype(np.float64), k[j][k_mask[j]].astype(np.float64)
        out[i, j] = np.mean([max(float(t @ u) for u in keys) for t in queries])
    return out
