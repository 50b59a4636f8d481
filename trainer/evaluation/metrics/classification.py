"""Classification without training: by prompts (zero-shot) and by nearest neighbors.

Ties count against the model: a sample is correct only if its class beats every other class.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels import gather_rows
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.ranking import Relevance, rank_queries, summarize
from gigabatch.trainer.evaluation.metrics.score_rows import Scorer, blocks, dot_rows, top_keys

LABEL = "label"
"""Key of the class label in the per-sample values."""
TOP_KS = (1, 5)


def class_vectors(prompts: Tensor, templates: int) -> Tensor:
    """Average the prompts of each class (CLIP, Radford et al. 2021, section 3.1.4).

    Args:
        prompts: [C * templates, D], ordered by class.
        templates: Number of prompts per class.

    Returns:
        float32 [C, D] of unit length: the normalized mean of a class's unit vectors.
    """
    unit = F.normalize(prompts.double(), dim=-1).view(-1, templates, prompts.shape[1])
    return F.normalize(unit.mean(1), dim=-1).float()


def zero_shot(images: Tensor, labels: Tensor, classes: Tensor, world: World) -> dict[str, Tensor]:
    """Classify samples by their most similar class vector.

    Args:
        images: This rank's samples [n, D].
        labels: int64 [n], rows of `classes`.
        classes: [C, D], the same on every rank.
        world: The ranks; every rank must call this function.

    Returns:
        `top1`, `top5` and `label` of every sample, float64 [N], on every rank.
    """
    return rank_classes(dot_rows(images, classes), labels, len(classes), world)


def rank_classes(
    score: Scorer, labels: Tensor, num_classes: int, world: World
) -> dict[str, Tensor]:
    """Classify samples by the scores of each class; return what `zero_shot` returns."""
    rows = torch.arange(len(labels), device=labels.device)
    relevance = Relevance.by_pairs(rows, labels, torch.ones_like(labels), len(labels))
    ranked = rank_queries(score, relevance, num_classes, TOP_KS, ndcg=False)
    return _gather({f"top{k}": ranked[f"hit@{k}"] for k in TOP_KS}, labels, world)


def nearest_neighbors(
    queries: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    world: World,
    k: int = 200,
    temperature: float = 0.07,
    leave_out: bool = False,
) -> dict[str, Tensor]:
    """Classify queries by their k nearest neighbors in a bank (Wu et al. 2018).

    A neighbor votes for its class with weight exp(cosine / temperature). If neighbors are equally
    similar, the first in the bank counts.

    Args:
        queries: This rank's rows [n, D].
        labels: int64 [n].
        bank: This rank's rows [m, D].
        bank_labels: int64 [m].
        world: The ranks; every rank must call this function.
        k: Number of neighbors per query.
        temperature: Temperature of the votes.
        leave_out: Whether the queries are the bank; a query is then not its own neighbor.

    Returns:
        `top1`, `top5` and `label` of every query, float64 [N], on every rank.
    """
    first = sum(world.gather(len(queries))[: world.rank])
    bank = gather_rows(F.normalize(bank.double(), dim=-1).float(), world.group)
    bank_labels = gather_rows(bank_labels, world.group)
    excluded = None
    if leave_out:
        excluded = first + torch.arange(len(queries), device=queries.device)
    unit = F.normalize(queries.double(), dim=-1).float()
    cosines, neighbors = top_keys(dot_rows(unit, bank), len(queries), len(bank), k, excluded)
    known, classes = bank_labels.unique(return_inverse=True)
    label_class = torch.searchsorted(known, labels).clamp(max=max(len(known) - 1, 0))
    # Subtract the nearest neighbor's cosine, so that exp does not overflow; ranks are unchanged.
    weights = torch.exp((cosines - cosines[:, :1]).double() / temperature)
    weights = torch.where(neighbors >= 0, weights, 0.0)
    tops = {f"top{t}": torch.zeros(len(queries)).double().to(queries.device) for t in TOP_KS}
    for part in blocks(len(queries), len(known)):
        votes = weights.new_zeros(part.stop - part.start, len(known))
        votes.scatter_add_(1, classes[neighbors[part].clamp(min=0)], weights[part])
        correct = votes.gather(1, label_class[part].unsqueeze(1))
        is_known = known[label_class[part]].unsqueeze(1) == labels[part].unsqueeze(1)
        correct = torch.where(is_known, correct, 0)
        before = (votes >= correct).sum(1) - 1  # without the class itself
        for top in TOP_KS:
            tops[f"top{top}"][part] = ((correct.squeeze(1) > 0) & (before < top)).double()
    return _gather(tops, labels, world)


def summarize_classification(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute `top1`, `top5`, and `class_top1`, the mean over classes of their `top1`."""
    metrics = summarize({name: column for name, column in values.items() if name != LABEL})
    _, classes = values[LABEL].unique(return_inverse=True)
    sums = torch.zeros(int(classes.max()) + 1, dtype=torch.float64, device=classes.device)
    correct = sums.index_add(0, classes, values["top1"])
    return metrics | {"class_top1": float((correct / torch.bincount(classes)).mean())}


def _gather(values: dict[str, Tensor], labels: Tensor, world: World) -> dict[str, Tensor]:
    gathered = {name: gather_rows(column, world.group) for name, column in values.items()}
    return gathered | {LABEL: gather_rows(labels, world.group)}
