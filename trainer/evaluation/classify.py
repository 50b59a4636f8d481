"""Classification without training: zero-shot by prompts, and by nearest neighbours.

Ties count against us: a sample is right only where its class beats every other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels import gather_rows
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.ranking import Relevance, rank_queries, summary
from gigabatch.trainer.evaluation.score_rows import Scorer, blocks, dot_rows, top_rows

LABEL = "label"
"""The class of each sample, kept beside its figures for the mean over classes."""
TOPS = (1, 5)


def class_vectors(prompts: Tensor, templates: int) -> Tensor:
    """[C, D] of unit length from [C * templates, D]: each class is the mean of its prompts' unit
    vectors (CLIP, Radford et al. 2021, section 3.1.4)."""
    each = F.normalize(prompts.double(), dim=-1).view(-1, templates, prompts.shape[1])
    return F.normalize(each.mean(1), dim=-1).float()


def zero_shot(images: Tensor, labels: Tensor, classes: Tensor, world: World) -> dict[str, Tensor]:
    """`top1`, `top5` and `label` of every sample, float64 [all], on every rank.

    `images` [n, D], `labels` int64 [n], row numbers of `classes` [C, D], the same on every rank.
    """
    return classified(dot_rows(images, classes), labels, len(classes), world)


def classified(score: Scorer, labels: Tensor, classes: int, world: World) -> dict[str, Tensor]:
    """The same from scores of each class."""
    rows = torch.arange(len(labels), device=labels.device)
    own = Relevance.by_pairs(rows, labels, torch.ones_like(labels), len(labels))
    found = rank_queries(score, own, classes, TOPS, ndcg=False)
    return _gathered({f"top{k}": found[f"hit@{k}"] for k in TOPS}, labels, world)


def nearest_neighbours(
    queries: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    world: World,
    k: int = 200,
    temperature: float = 0.07,
    leave_out: bool = False,
) -> dict[str, Tensor]:
    """`top1`, `top5` and `label` of every query, float64 [all], on every rank: its k nearest of
    the bank, by cosine, vote with exp(cosine / temperature) (Wu et al. 2018).

    `queries` [n, D], `bank` [m, D]: this rank's rows, with int64 labels. `leave_out`: the queries
    are the bank, and none is its own neighbour. Of equal neighbours the first in the bank counts.
    """
    first = sum(world.gather(len(queries))[: world.rank])
    bank = gather_rows(F.normalize(bank.double(), dim=-1).float(), world.group)
    bank_labels = gather_rows(bank_labels, world.group)
    own = None
    if leave_out:
        own = first + torch.arange(len(queries), device=queries.device)
    unit = F.normalize(queries.double(), dim=-1).float()
    near, who = top_rows(dot_rows(unit, bank), len(queries), len(bank), k, own)
    known, classes = bank_labels.unique(return_inverse=True)
    place = torch.searchsorted(known, labels).clamp(max=max(len(known) - 1, 0))
    weights = torch.exp((near - near[:, :1]).double() / temperature)
    weights = torch.where(who >= 0, weights, 0.0)
    found = {f"top{t}": torch.zeros(len(queries)).double().to(queries.device) for t in TOPS}
    for part in blocks(len(queries), len(known)):
        votes = weights.new_zeros(part.stop - part.start, len(known))
        votes.scatter_add_(1, classes[who[part].clamp(min=0)], weights[part])
        right = votes.gather(1, place[part].unsqueeze(1))
        right = torch.where(known[place[part]].unsqueeze(1) == labels[part].unsqueeze(1), right, 0)
        before = (votes >= right).sum(1) - 1
        for top in TOPS:
            found[f"top{top}"][part] = ((right.squeeze(1) > 0) & (before < top)).double()
    return _gathered(found, labels, world)


def classification_summary(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """`top1`, `top5`, and `class_top1`, the mean over classes of their own `top1`."""
    told = summary({name: values for name, values in figures.items() if name != LABEL})
    _, place = figures[LABEL].unique(return_inverse=True)
    sums = torch.zeros(int(place.max()) + 1, dtype=torch.float64, device=place.device)
    right = sums.index_add(0, place, figures["top1"])
    return told | {"class_top1": float((right / torch.bincount(place)).mean())}


def _gathered(figures: dict[str, Tensor], labels: Tensor, world: World) -> dict[str, Tensor]:
    known = {name: gather_rows(values, world.group) for name, values in figures.items()}
    return known | {LABEL: gather_rows(labels, world.group)}
