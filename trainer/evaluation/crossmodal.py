"""Retrieval across modalities and what is read from it: each way, in each language, and against
captions with the order changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.kernels import gather_rows
from gigabatch.trainer.config import Config, singles
from gigabatch.trainer.evaluation import settings as keys
from gigabatch.trainer.evaluation.embedding import (
    NAMED_BY_NUMBER,
    Embedded,
    Reading,
    caption_settings,
    require_towers,
)
from gigabatch.trainer.evaluation.ranking import summary
from gigabatch.trainer.evaluation.retrieval import (
    comparison_figures,
    comparisons,
    joint_figures,
    retrieval_figures,
    retrieval_summary,
    way_names,
)
from gigabatch.trainer.evaluation.score_rows import score_pairs
from gigabatch.trainer.evaluation.statistics import order_accuracy, rank_variance
from gigabatch.trainer.evaluation.taps import HEAD, place_compared
from gigabatch.trainer.evaluation.task import Measured, Subject
from gigabatch.trainer.taps import parse_tap


def measure_retrieval(subject: Subject, wanted: keys.Retrieval) -> Measured:
    positives, config = subject.positives(wanted.positives), subject.config
    captions = caption_settings(config, wanted.captions) if wanted.captions else None
    columns = [positives] if positives else []
    if wanted.given and wanted.find:
        read = (*wanted.given, wanted.find)
        found = subject.embed_compared(Reading(read, columns, captions, wanted.width), HEAD)
        score = wanted.score or _natural_score(config, read)
        figures = joint_figures(found, wanted.given, wanted.find, score, positives, subject.world)
    else:
        between = wanted.between or comparisons(config)[0]
        if len(between) < 2:
            raise GigabatchError(
                f"retrieval: it takes two modalities, and the run has {between[0]} alone; measure "
                "it by knn or probe."
            )
        reading = Reading(between, columns, captions, wanted.width)
        found = subject.embed_compared(reading, place_compared(config, between, wanted.tap))
        figures = comparison_figures(found, positives, subject.world)
    count = len(subject.index)

    def tell(some: Mapping[str, Tensor]) -> dict[str, float]:
        return retrieval_summary(some, count)

    return Measured(subject.name, figures, tell, samples=subject.numbers(found))


def _natural_score(config: Config, modalities: Sequence[str]) -> str:
    """How the run's objective scores such modalities together."""
    read = [
        {parse_tap(tap).modality for tap in each.taps}
        for each in singles(config.objective)
        if each.retrieval_score() == "product"
    ]
    return "product" if any(set(modalities) <= taps for taps in read) else "sum"


def measure_languages(subject: Subject, wanted: keys.Languages) -> Measured:
    positives, modality = subject.positives(wanted.positives), captioned(subject, wanted.modality)
    columns = [positives] if positives else []
    first, figures, ranks = None, {}, dict[str, list[Tensor]]()
    for language in wanted.captions:
        found = _embed_captions(subject, modality, language, columns, first)
        first = first or found
        each = retrieval_figures(found, positives, subject.world)
        for way in way_names(modality, "text"):
            for k in (1, 10):
                figures[f"{language}/{way}_recall@{k}"] = each[f"{way}_recall@{k}"]
            ranks.setdefault(way, []).append(each[f"{way}_rank"])
    for way, of_languages in ranks.items():
        spread = rank_variance(torch.stack(of_languages))
        figures[f"{way}_mrv"] = spread["rank_variance"]
        figures[f"{way}_mrv_std"] = spread["rank_std"]
        for k in (1, 10):
            in_each = [figures[f"{language}/{way}_recall@{k}"] for language in wanted.captions]
            figures[f"{way}_recall@{k}"] = torch.stack(in_each).mean(0)
    assert first is not None
    told = {"languages": float(len(wanted.captions)), "candidates": float(len(subject.index))}
    return Measured(subject.name, figures, summary, told, subject.numbers(first))


def measure_order(subject: Subject, wanted: keys.Order) -> Measured:
    modality = captioned(subject, wanted.modality)
    found = _embed_captions(subject, modality, wanted.captions, [], None)
    asks, wrong = found.rows(modality), []
    for name in wanted.against:
        other = _embed_captions(subject, modality, name, [], found)
        wrong.append(score_pairs(asks, other.rows("text")))
    right = score_pairs(asks, found.rows("text"))
    figure = order_accuracy(right, torch.stack(wrong, 1))
    figures = {"order_accuracy": gather_rows(figure, subject.world.group)}
    return Measured(subject.name, figures, samples=subject.numbers(found))


def captioned(subject: Subject, given: str | None) -> str:
    """The modality that captions are compared with."""
    others = [name for name in subject.config.modalities if name != "text"]
    if given == "text" or not others:
        raise GigabatchError(
            "modality: captions are compared with another modality than text; the run has "
            f"{', '.join(others) or 'text alone'}."
        )
    require_towers(subject.config, [given or others[0], "text"])
    return given or others[0]


def _embed_captions(
    subject: Subject,
    modality: str,
    name: str | None,
    columns: Sequence[str],
    beside: Embedded | None,
) -> Embedded:
    """The set with the captions of one field, or of the run's; the other modality from `beside`, if
    given."""
    captions = caption_settings(subject.config, name) if name else None
    read = ["text"] if beside else [modality, "text"]
    place = place_compared(subject.config, [modality, "text"])
    found = subject.embed_compared(Reading(read, columns, captions), place)
    kept = beside or found
    theirs, ours = (each.columns[NAMED_BY_NUMBER] for each in (kept, found))
    if other := (theirs != ours).nonzero().flatten().tolist():
        raise GigabatchError(
            f"{subject.index.where(int(theirs[other[0]]))} has no caption in {name}, or has one "
            f"that another field lacks ({len(other)} of {len(ours)} samples here). Compare samples "
            "that have them all: make a view with `gigabatch data filter`."
        )
    taps = {modality: kept.taps[modality], "text": found.taps["text"]}
    return Embedded(taps, found.columns, {**kept.masks, **found.masks})
