"""The tasks of `gigabatch eval`: each reads a set through the towers and gives a `Measured`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.data.settings import Settings
from gigabatch.trainer.evaluation import settings as keys
from gigabatch.trainer.evaluation.batch_bias import measure_batch_bias
from gigabatch.trainer.evaluation.classify import (
    class_vectors,
    classification_summary,
    nearest_neighbours,
    zero_shot,
)
from gigabatch.trainer.evaluation.crossmodal import (
    captioned,
    measure_languages,
    measure_order,
    measure_retrieval,
)
from gigabatch.trainer.evaluation.documents import measure_text_retrieval
from gigabatch.trainer.evaluation.embedding import (
    NAMED_BY_NUMBER,
    Reading,
    embed_texts,
)
from gigabatch.trainer.evaluation.geometry import geometry
from gigabatch.trainer.evaluation.labelled import read_labelled
from gigabatch.trainer.evaluation.labels import named_classes
from gigabatch.trainer.evaluation.probe import linear_probe
from gigabatch.trainer.evaluation.regression import regression_probe, regression_summary
from gigabatch.trainer.evaluation.sample_state import measure_table
from gigabatch.trainer.evaluation.task import Measured, Subject
from gigabatch.trainer.evaluation.trigger import measure_trigger


def measure_zero_shot(subject: Subject, wanted: keys.ZeroShot) -> Measured:
    for template in wanted.templates:
        if "{}" not in template:
            raise GigabatchError(f"templates: {template!r} has no {{}} for the name of the class.")
    modality = captioned(subject, wanted.modality)
    names, labels = named_classes(subject.values(wanted.label), wanted.classes, wanted.label)
    prompts = [each.replace("{}", name) for name in names for each in wanted.templates]
    run, config, world = subject.run, subject.config, subject.world
    vectors = embed_texts(subject.towers, prompts, config, run, world).gathered(world.group).values
    found = subject.embed(Reading(modalities=[modality]))
    own = labels.to(vectors.device)[found.columns[NAMED_BY_NUMBER]]
    classes = class_vectors(vectors, len(wanted.templates))
    return Measured(
        subject.name,
        zero_shot(found.taps[modality], own, classes, world),
        classification_summary,
        {"classes": float(len(names)), "templates": float(len(wanted.templates))},
        subject.numbers(found),
    )


def measure_neighbours(subject: Subject, wanted: keys.Neighbours) -> Measured:
    train, test, same = read_labelled(subject, wanted)
    figures = nearest_neighbours(
        test.x, test.classes(), train.x, train.classes(), subject.world, wanted.k,
        wanted.temperature, same,
    )  # fmt: skip
    numbers = subject.numbers(test.found)
    return Measured(subject.name, figures, classification_summary, samples=numbers)


def measure_probe(subject: Subject, wanted: keys.Probe) -> Measured:
    train, test, same = read_labelled(subject, wanted)
    if same:
        raise GigabatchError(
            f"probe: {subject.on} is also the set that the probe is fitted on. Name another one "
            "with train=SET, or another --on."
        )
    world, seed, numbers = subject.world, subject.config.run.seed, subject.numbers(test.found)
    if wanted.kind == "regression":
        known, asked = ((side.x, side.numbers()) for side in (train, test))
        figures, l2 = regression_probe(known, asked, world, seed)
        return Measured(subject.name, figures, regression_summary, {"l2": l2}, numbers)
    known, asked = ((side.x, side.classes()) for side in (train, test))
    figures, l2 = linear_probe(known, asked, world, seed)
    return Measured(subject.name, figures, classification_summary, {"l2": l2}, numbers)


def measure_geometry(subject: Subject, wanted: keys.Geometry) -> Measured:
    found = subject.embed(Reading(subject.config.modalities), wanted.tap)
    labels = subject.codes(wanted.label, found) if wanted.label else None
    told = geometry(found.taps, labels, subject.world, subject.config.run.seed)
    return Measured(subject.name, told=told)


MEASURES: dict[str, Callable[[Subject, Any], Measured]] = {
    "retrieval": measure_retrieval,
    "zero-shot": measure_zero_shot,
    "knn": measure_neighbours,
    "probe": measure_probe,
    "geometry": measure_geometry,
    "text-retrieval": measure_text_retrieval,
    "languages": measure_languages,
    "order": measure_order,
    "table": measure_table,
    "batch-bias": measure_batch_bias,
    "trigger": measure_trigger,
}


def measure(task: str, subject: Subject, wanted: Settings) -> Measured:
    """Raises GigabatchError for whatever the set or the run lacks."""
    return MEASURES[task](subject, wanted)
