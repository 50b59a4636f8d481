"""Retrieval across modalities and what is read from it: each way, in each language, and against
captions with the order changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.kernels import gather_rows
from gigabatch.trainer.evaluation import settings as keys
from gigabatch.trainer.evaluation.embedding import (
    NAMED_BY_NUMBER,
    Embedded,
    Reading,
    caption_settings,
)
from gigabatch.trainer.evaluation.ranking import summary
from gigabatch.trainer.evaluation.retrieval import retrieval_figures, retrieval_summary
from gigabatch.trainer.evaluation.statistics import order_accuracy, rank_variance
from gigabatch.trainer.evaluation.subject import Measured, Subject


def measure_retrieval(subject: Subject, wanted: keys.Retrieval) -> Measured:
    positives = subject.positives(wanted.positives)
    captions = caption_settings(subject.config, wanted.captions) if wanted.captions else None
    between = wanted.between or subject.config.modalities[:2]
    if len(set(between)) < 2:
        raise GigabatchError(
            f"retrieval: it takes two modalities, and got {', '.join(between)} alone; measure one "
            "by knn or probe."
        )
    reading = Reading(between, [positives] if positives else [], captions)
    found = subject.embed(reading)
    figures = retrieval_figures(found, positives, subject.world)
    count = len(subject.index)

    def tell(some: Mapping[str, Tensor]) -> dict[str, float]:
        return retrieval_summary(dict(some), count)

    return Measured(subject.name, figures, tell, samples=subject.numbers(found))


def measure_languages(subject: Subject, wanted: keys.Languages) -> Measured:
    positives = subject.positives(wanted.positives)
    columns = [positives] if positives else []
    first, figures, ranks = None, {}, dict[str, list[Tensor]]()
    for language in wanted.captions:
        found = _embed_captions(subject, language, columns, first)
        first = first or found
        each = retrieval_figures(found, positives, subject.world)
        for way in ("i2t", "t2i"):
            figures[f"{language}/{way}_recall@1"] = each[f"{way}_recall@1"]
            figures[f"{language}/{way}_recall@10"] = each[f"{way}_recall@10"]
            ranks.setdefault(way, []).append(each[f"{way}_rank"])
    for way, of_languages in ranks.items():
        spread = rank_variance(torch.stack(of_languages))
        figures[f"{way}_mrv"] = spread["rank_variance"]
        figures[f"{way}_mrv_std"] = spread["rank_std"]
    assert first is not None
    told = {"languages": float(len(wanted.captions)), "candidates": float(len(subject.index))}
    return Measured(subject.name, figures, summary, told, subject.numbers(first))


def measure_order(subject: Subject, wanted: keys.Order) -> Measured:
    own = caption_settings(subject.config, wanted.captions) if wanted.captions else None
    found = subject.embed(Reading(captions=own))
    image = found.taps["image"].double()
    wrong = []
    for name in wanted.against:
        other = _embed_captions(subject, name, [], found)
        wrong.append((image * other.taps["text"].double()).sum(1))
    right = (image * found.taps["text"].double()).sum(1)
    figure = order_accuracy(right.float(), torch.stack(wrong, 1).float())
    figures = {"order_accuracy": gather_rows(figure, subject.world.group)}
    return Measured(subject.name, figures, samples=subject.numbers(found))


def _embed_captions(
    subject: Subject, name: str, columns: Sequence[str], beside: Embedded | None
) -> Embedded:
    """The set with the captions of one field; its images from `beside`, if given."""
    captions = caption_settings(subject.config, name)
    kinds = ["text"] if beside else ["image", "text"]
    found = subject.embed(Reading(kinds, columns, captions))
    if beside is None:
        return found
    theirs, ours = (each.columns[NAMED_BY_NUMBER] for each in (beside, found))
    if other := (theirs != ours).nonzero().flatten().tolist():
        raise GigabatchError(
            f"{subject.index.where(int(theirs[other[0]]))} has no caption in {name}, or has one "
            f"that another field lacks ({len(other)} of {len(ours)} samples here). Compare samples "
            "that have them all: make a view with `gigabatch data filter`."
        )
    return Embedded({"image": beside.taps["image"], **found.taps}, found.columns)
