"""What each task of `gigabatch eval` can be told, as `key=value`; docstrings are the help."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from gigabatch.data.errors import GigabatchError
from gigabatch.data.settings import Settings

OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Texts = Annotated[tuple[str, ...], OneOrMore]


class Retrieval(Settings):
    """Retrieval between image and text, or two other modalities, both ways."""

    between: tuple[str, str] | None = None
    """Two of the run's modalities, [audio, text]. Unset: the run's first two, of image, text and
    `towers.more`."""
    positives: str | None = None
    """The json field that right answers share; `none` for pairs alone. Unset: the run's."""
    captions: str | None = None
    """Where the captions are: txt, or a json field such as names.de. Unset: where the run's are."""
    width: int | None = Field(None, ge=1)
    """So many first coordinates of the vectors alone (Matryoshka). Unset: all."""


class ZeroShot(Settings):
    """Classification of images by prompts."""

    label: str
    """The json field that holds the class."""
    classes: Path | None = None
    """A .json file that maps its values to names, or a text file whose line n names the value n.
    Unset: the values are the names."""
    templates: Annotated[Texts, Field(min_length=1)] = ("{}",)
    """Prompts, with {} for the name; a class is the mean of its prompts. One, or a list."""


class Neighbours(Settings):
    """Classification by the nearest training samples."""

    label: str
    """The json field that holds the class."""
    train: str | None = None
    """The set whose labels are known; the set itself leaves each sample out. Unset: the run's."""
    modality: str = "image"
    """image, text, or one of `towers.more`."""
    tap: str = "head"
    """Where the towers are read: head, encoder (before the head), or a module's path."""
    width: int | None = Field(None, ge=1)
    """So many first coordinates of the vectors alone (Matryoshka). Unset: all."""
    k: int = Field(200, ge=1)
    temperature: float = Field(0.07, gt=0)
    """A neighbour's vote is exp(cosine / temperature)."""


class Probe(Settings):
    """A linear classifier on frozen embeddings."""

    label: str
    """The json field that holds the class."""
    train: str | None = None
    """The set that it is fitted on. Unset: the run's."""
    modality: str = "image"
    """image, text, or one of `towers.more`."""
    tap: str = "head"
    """Where the towers are read: head, encoder (before the head), or a module's path."""
    width: int | None = Field(None, ge=1)
    """So many first coordinates of the vectors alone (Matryoshka). Unset: all."""


class Geometry(Settings):
    """Uniformity, alignment, tolerance, isotropy, effective rank, modality gap."""

    label: str | None = None
    """The json field of the classes of tolerance. Unset: no tolerance."""
    tap: str = "head"
    """Where the towers are read: head, encoder (before the head), or a module's path."""


class TextRetrieval(Settings):
    """Retrieval of documents by the text tower, beside TF-IDF; --on is a JSONL file or a folder in
    the BEIR layout."""

    split: str = "test"
    """Of a BEIR folder: qrels/SPLIT.tsv."""
    query_prefix: str = ""
    """What stands before each query, such as `query: `."""
    document_prefix: str = ""


class Languages(Settings):
    """Consistency over languages: retrieval in each, and MRV."""

    captions: Annotated[Texts, Field(min_length=2)]
    """The caption fields, one a language: [names.en, names.de]."""
    positives: str | None = None
    """The json field that right answers share; `none` for pairs alone. Unset: the run's."""


class Order(Settings):
    """Whether an image prefers its caption to one with the order of things changed."""

    against: Annotated[Texts, Field(min_length=1)]
    """The json fields that hold wrong captions. One, or a list."""
    captions: str | None = None
    """Where the right one is. Unset: where the run's captions are."""


class History(Settings):
    """Best against last step, of the evaluations made while training. Needs no --on."""


TASKS: dict[str, type[Settings]] = {
    "retrieval": Retrieval,
    "zero-shot": ZeroShot,
    "knn": Neighbours,
    "probe": Probe,
    "geometry": Geometry,
    "text-retrieval": TextRetrieval,
    "languages": Languages,
    "order": Order,
    "history": History,
}


def task_settings(task: str, given: Sequence[str]) -> Settings:
    """The settings of a task from `key=value` texts. Raises GigabatchError, which teaches."""
    if task not in TASKS:
        raise GigabatchError(f"--task {task}: there is no such task; take {', '.join(TASKS)}.")
    model, values = TASKS[task], dict[str, Any]()
    known = list(model.model_fields)
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise GigabatchError(f"{text!r}: say key=value. Keys of {task}: {_keys(model)}")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.6)
            hint = f"did you mean {close[0]}?" if close else f"keys: {_keys(model)}"
            raise GigabatchError(f"{name}: {task} has no such key; {hint}")
        if model.model_fields[name].annotation is str:  # to YAML, `query: ` is a mapping
            values[name] = value
            continue
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise GigabatchError(
            "\n".join(_explained(task, model, e) for e in error.errors())
        ) from error


def _keys(model: type[Settings]) -> str:
    return ", ".join(model.model_fields) or "none"


def _explained(task: str, model: type[Settings], item: Any) -> str:
    name = str(item["loc"][0]) if item["loc"] else ""
    about = model.model_fields[name].description if name in model.model_fields else None
    what = "must be given" if item["type"] == "missing" else item["msg"]
    help_text = f" {' '.join(about.split())}" if about else ""
    return f"{task}: {name}: {what}.{help_text}"
