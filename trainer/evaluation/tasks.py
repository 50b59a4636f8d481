"""The tasks of `gigabatch eval`: each reads a set through the towers and gives a `Measured`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigabatch.data.corpora import open_collection
from gigabatch.data.errors import GigabatchError
from gigabatch.data.index import Index
from gigabatch.data.indexing import open_index
from gigabatch.data.settings import Settings
from gigabatch.kernels import gather_rows
from gigabatch.trainer.config import Config, positives_of
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation import settings as keys
from gigabatch.trainer.evaluation.classify import (
    class_vectors,
    classification_summary,
    nearest_neighbours,
    zero_shot,
)
from gigabatch.trainer.evaluation.embedding import (
    NAMED_BY_NUMBER,
    Embedded,
    Reading,
    caption_settings,
    embed_set,
    embed_texts,
)
from gigabatch.trainer.evaluation.geometry import geometry
from gigabatch.trainer.evaluation.labels import codes_of, field_values, named_classes
from gigabatch.trainer.evaluation.lexical import tfidf_rows
from gigabatch.trainer.evaluation.probe import linear_probe
from gigabatch.trainer.evaluation.ranking import Relevance, rank_queries, summary
from gigabatch.trainer.evaluation.retrieval import retrieval_figures, retrieval_summary
from gigabatch.trainer.evaluation.scores import Scorer, dot_rows
from gigabatch.trainer.evaluation.statistics import Tell, order_accuracy, rank_variance
from gigabatch.trainer.evaluation.taps import tapped
from gigabatch.trainer.inputs import cache_of, open_eval
from gigabatch.trainer.runfolder import RunFolder
from gigabatch.trainer.towers import Towers

TEXT_CUTS = (1, 5, 10, 100)
TOLD_OF_TEXTS = ("hit@1", "ndcg@10", "mrr", "map", "r_precision", "rank")


@dataclass(frozen=True)
class Subject:
    """What is measured, and where: a run's towers, on the set `on`."""

    run: RunFolder
    config: Config
    towers: Towers
    world: World
    on: str

    @cached_property
    def index(self) -> Index:
        return self.open(self.on)

    def open(self, on: str) -> Index:
        """A folder as the user sees it; else the name of one of the run's own sets."""
        return open_index(on) if Path(on).is_dir() else open_eval(self.config, on)

    def embed(self, reading: Reading, tap: str = "head", index: Index | None = None) -> Embedded:
        if reading.width is not None and tap != "head":
            raise GigabatchError(
                f"width={reading.width}: it cuts what the loss sees; leave out tap=."
            )
        found = embed_set(
            tapped(self.towers, tap),
            index or self.index,
            self.config,
            self.run,
            self.world,
            reading,
        )
        assert found is not None  # nobody asked it to stop
        return found

    def values(self, name: str, index: Index | None = None, required: bool = True) -> list[Any]:
        """A field of every sample: read by rank 0 for all."""
        index, main = index or self.index, self.world.is_main
        found = field_values(index, name, cache_of(self.config), required) if main else None
        return list(self.world.share(found))

    def codes(self, name: str, found: Embedded, index: Index | None = None) -> Tensor:
        """int64 [n]: the codes of a field of this rank's rows."""
        number = found.columns[NAMED_BY_NUMBER]
        return codes_of(self.values(name, index)).to(number.device)[number]


@dataclass(frozen=True)
class Measured:
    """`name`: of the set. `figures`: of every query, float64 [N], in order; `tell` makes metrics of
    them, or of some of them. `told`: metrics that are of no query. `samples`: int64 [N], whose
    metadata a query has; None where there is none."""

    name: str
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    tell: Tell = summary
    told: Mapping[str, float] = field(default_factory=dict)
    samples: Tensor | None = None

    def metrics(self) -> dict[str, float]:
        return {**(self.tell(self.figures) if self.figures else {}), **self.told}


def _positives(subject: Subject, given: str | None) -> str | None:
    field = positives_of(subject.config.objective) if given is None else given
    return None if field == "none" else field


def _set_name(subject: Subject) -> str:
    return Path(subject.on).resolve().name if Path(subject.on).is_dir() else subject.index.name


def _numbers(subject: Subject, found: Embedded) -> Tensor:
    return gather_rows(found.columns[NAMED_BY_NUMBER], subject.world.group)


def measure_retrieval(subject: Subject, wanted: keys.Retrieval) -> Measured:
    positives = _positives(subject, wanted.positives)
    captions = caption_settings(subject.config, wanted.captions) if wanted.captions else None
    between = wanted.between or subject.config.modalities[:2]
    if len(set(between)) < 2:
        raise GigabatchError(
            f"retrieval: it takes two modalities, and got {', '.join(between)} alone; measure one "
            "by knn or probe."
        )
    reading = Reading(between, [positives] if positives else [], captions, wanted.width)
    found = subject.embed(reading)
    figures = retrieval_figures(found, positives, subject.world)
    count = len(subject.index)

    def tell(some: Mapping[str, Tensor]) -> dict[str, float]:
        return retrieval_summary(dict(some), count)

    return Measured(_set_name(subject), figures, tell, samples=_numbers(subject, found))


def measure_zero_shot(subject: Subject, wanted: keys.ZeroShot) -> Measured:
    for template in wanted.templates:
        if "{}" not in template:
            raise GigabatchError(f"templates: {template!r} has no {{}} for the name of the class.")
    names, labels = named_classes(subject.values(wanted.label), wanted.classes, wanted.label)
    prompts = [each.replace("{}", name) for name in names for each in wanted.templates]
    run, config, world = subject.run, subject.config, subject.world
    vectors = gather_rows(embed_texts(subject.towers, prompts, config, run, world), world.group)
    found = subject.embed(Reading(modalities=["image"]))
    own = labels.to(vectors.device)[found.columns[NAMED_BY_NUMBER]]
    classes = class_vectors(vectors, len(wanted.templates))
    return Measured(
        _set_name(subject),
        zero_shot(found.taps["image"], own, classes, world),
        classification_summary,
        {"classes": float(len(names)), "templates": float(len(wanted.templates))},
        _numbers(subject, found),
    )


Labelled = tuple[Tensor, Tensor]


def _labelled(
    subject: Subject, wanted: keys.Neighbours | keys.Probe
) -> tuple[Labelled, Labelled, bool, Embedded]:
    """((features, labels) of the training set, the same of this one, whether they are one set,
    what was embedded of this one)."""
    reading = Reading(modalities=[wanted.modality], width=wanted.width)
    test_found = subject.embed(reading, wanted.tap)
    test = test_found.taps[wanted.modality], subject.codes(wanted.label, test_found)
    train_index = subject.open(wanted.train or subject.config.data.train[0].path)
    if train_index.digest == subject.index.digest:
        return test, test, True, test_found
    found = subject.embed(reading, wanted.tap, train_index)
    train = found.taps[wanted.modality], subject.codes(wanted.label, found, train_index)
    return train, test, False, test_found


def measure_neighbours(subject: Subject, wanted: keys.Neighbours) -> Measured:
    train, test, same, found = _labelled(subject, wanted)
    (bank, known), (queries, labels) = train, test
    figures = nearest_neighbours(
        queries, labels, bank, known, subject.world, wanted.k, wanted.temperature, same
    )
    numbers = _numbers(subject, found)
    return Measured(_set_name(subject), figures, classification_summary, samples=numbers)


def measure_probe(subject: Subject, wanted: keys.Probe) -> Measured:
    train, test, same, found = _labelled(subject, wanted)
    if same:
        raise GigabatchError(
            f"probe: {subject.on} is also the set that the probe is fitted on. Name another one "
            "with train=SET, or another --on."
        )
    figures, l2 = linear_probe(train, test, subject.world, subject.config.run.seed)
    numbers = _numbers(subject, found)
    return Measured(_set_name(subject), figures, classification_summary, {"l2": l2}, numbers)


def measure_geometry(subject: Subject, wanted: keys.Geometry) -> Measured:
    found = subject.embed(Reading(), wanted.tap)
    labels = subject.codes(wanted.label, found) if wanted.label else None
    told = geometry(found.taps, labels, subject.world, subject.config.run.seed)
    return Measured(_set_name(subject), told=told)


def measure_text_retrieval(subject: Subject, wanted: keys.TextRetrieval) -> Measured:
    source, world = Path(subject.on), subject.world
    held = open_collection(source, wanted.split)
    queries = [wanted.query_prefix + text for text in held.queries]
    documents = [wanted.document_prefix + text for text in held.documents]
    q, d = (
        gather_rows(embed_texts(subject.towers, t, subject.config, subject.run, world), world.group)
        for t in (queries, documents)
    )
    edges = [len(queries) * rank // world.size for rank in range(world.size + 1)]
    own = slice(edges[world.rank], edges[world.rank + 1])
    rows, right, grades = zip(*held.judged, strict=True)
    relevance = Relevance.by_pairs(
        torch.tensor(rows),
        torch.tensor(right),
        torch.tensor(grades, dtype=torch.float64),
        len(queries),
        torch.tensor(held.same),
    ).to(q.device)
    lexical = tfidf_rows(held.queries, held.documents)
    figures = {}
    scorers: dict[str, Scorer] = {
        "": dot_rows(q, d), "tfidf_": lambda part: lexical(part).to(q.device),
    }  # fmt: skip
    for prefix, score in scorers.items():
        mine = rank_queries(_shifted(score, own.start), relevance.part(own), len(d), TEXT_CUTS)
        for name in (*TOLD_OF_TEXTS, *(f"recall@{k}" for k in TEXT_CUTS)):
            figures[prefix + name] = gather_rows(mine[name], world.group)
    told = {"documents": float(len(documents)), "queries": float(len(queries))}
    if held.orders:
        told["order_accuracy"] = _order_of_triples(q, d, held.orders)
    return Measured(held.name, figures, told=told)


def _shifted(score: Scorer, first: int) -> Scorer:
    return lambda part: score(slice(part.start + first, part.stop + first))


def _order_of_triples(q: Tensor, d: Tensor, orders: Sequence[Any]) -> float:
    """The share of (anchor, positive, negatives) whose positive is above all negatives."""
    right = []
    for query, document, wrong in orders:
        scores = (d[[document, *wrong]].double() @ q[query].double()).float()
        right.append(order_accuracy(scores[:1], scores[None, 1:]))
    return float(torch.cat(right).mean())


def measure_languages(subject: Subject, wanted: keys.Languages) -> Measured:
    positives = _positives(subject, wanted.positives)
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
    return Measured(_set_name(subject), figures, summary, told, _numbers(subject, first))


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
    return Measured(_set_name(subject), figures, samples=_numbers(subject, found))


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


MEASURES: dict[str, Callable[[Subject, Any], Measured]] = {
    "retrieval": measure_retrieval,
    "zero-shot": measure_zero_shot,
    "knn": measure_neighbours,
    "probe": measure_probe,
    "geometry": measure_geometry,
    "text-retrieval": measure_text_retrieval,
    "languages": measure_languages,
    "order": measure_order,
}


def measure(task: str, subject: Subject, wanted: Settings) -> Measured:
    """Raises GigabatchError for whatever the set or the run lacks."""
    return MEASURES[task](subject, wanted)
