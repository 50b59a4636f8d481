"""Dense references in numpy, written from the definitions: whole score matrices, sorted lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def ranked(scores: np.ndarray, grades: np.ndarray, own: int = -1) -> list[int]:
    """Keys from the first place to the last; of equal scores, the lower grade first."""
    keys = [j for j in range(len(scores)) if j != own]

    def better(j: int) -> Any:
        score = float(scores[j])
        if math.isnan(score):
            score = math.inf if grades[j] <= 0 else -math.inf
        return (-score, grades[j])

    return sorted(keys, key=better)


def figures(
    scores: np.ndarray, grades: np.ndarray, ks: Sequence[int], own: np.ndarray | None = None
) -> dict[str, list[float]]:
    """scores, grades [Q, N] -> figure -> one value a query."""
    out: dict[str, list[float]] = {}
    for i, (row, grade) in enumerate(zip(scores, grades, strict=True)):
        grade = np.maximum(grade, 0.0)
        order = ranked(row, grade, -1 if own is None else int(own[i]))
        gains = [float(grade[j]) for j in order]
        right = sum(g > 0 for g in gains)
        for name, value in one_list(gains, right, ks).items():
            out.setdefault(name, []).append(value if right else math.nan)
    return out


def one_list(gains: list[float], right: int, ks: Sequence[int]) -> dict[str, float]:
    def dcg(values: list[float], k: int) -> float:
        return sum(g / math.log2(place + 2) for place, g in enumerate(values[:k]))

    def inside(k: int) -> int:
        return sum(g > 0 for g in gains[:k])

    out: dict[str, float] = {}
    for k in ks:
        out[f"hit@{k}"] = float(inside(k) > 0)
        out[f"recall@{k}"] = inside(k) / max(right, 1)
        out[f"precision@{k}"] = inside(k) / k
        ideal = dcg(sorted(gains, reverse=True), k)
        out[f"ndcg@{k}"] = dcg(gains, k) / ideal if ideal else 0.0
    places = [place for place, g in enumerate(gains, start=1) if g > 0]
    out["mrr"] = 1 / places[0] if places else 0.0
    out["map"] = sum(inside(p) / p for p in places) / max(right, 1)
    out["r_precision"] = inside(right) / max(right, 1)
    out["rank"] = float(places[0]) if places else math.nan
    return out


def maxsim(q: np.ndarray, real_q: np.ndarray, k: np.ndarray, real_k: np.ndarray) -> np.ndarray:
    """[Q, N]: the mean over a query's real tokens of the best product with a key's."""
    out = np.empty((len(q), len(k)))
    for i, j in np.ndindex(*out.shape):
        asks, answers = q[i][real_q[i]].astype(np.float64), k[j][real_k[j]].astype(np.float64)
        out[i, j] = np.mean([max(float(t @ u) for u in answers) for t in asks])
    return out
