"""What each task of `gigabatch eval` can be told, as `key=value`; docstrings are the help."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from gigabatch.data.errors import GigabatchError
from gigabatch.data.settings import Settings

OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Texts = Annotated[tuple[str, ...], OneOrMore]


class Retrieval(Settings):
    """Retrieval between image and text, or two other modalities, both ways; or of one modality by
    several."""

    between: tuple[str, str] | None = None
    """Two of the run's modalities, [audio, text]. Unset: what its (first) objective compares: two,
    or with symile each modality by all others."""
    tap: Literal["head", "tokens"] | None = None
    """head: one vector a sample; tokens: late interaction. Unset: tokens where the objective reads
    those of both modalities, and not their vectors."""
    given: Annotated[Texts, Field(min_length=1)] | None = None
    """Modalities that together ask, [image, labs]; with `find`."""
    find: str | None = None
    """The modality that is looked for; with `given`."""
    score: Literal["product", "sum"] | None = None
    """With `given`. product: sum_d of the product of all vectors; sum: the sum of dot products with
    each. Unset: product where a symile objective reads all of them, else sum."""
    positives: str | None = None
    """The json field that right answers share; `none` for pairs alone. Unset: the run's."""
    captions: str | None = None
    """Where the captions are: txt, or a json field such as names.de. Unset: where the run's are."""
    width: int | None = Field(None, ge=1)
    """So many first coordinates of the vectors alone (Matryoshka). Unset: all."""

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        if (self.given is None) != (self.find is None):
            raise ValueError("given and find go together, as in given=[image,labs] find=text")
        if self.given is None:
            if self.score:
                raise ValueError("score is of given=[A,B] find=C; between compares two modalities")
            if self.between and len(set(self.between)) < 2:
                raise ValueError(f"between takes two modalities, and got {self.between[0]} alone")
            return self
        for name in ("between", "tap"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is of two modalities, both ways; given and find of several, one way. "
                    "Give one or the other"
                )
        named = [*self.given, str(self.find)]
        if len(set(named)) < len(named):
            raise ValueError(f"given and find name a modality twice: {', '.join(named)}")
        return self


class ZeroShot(Settings):
    """Classification of images, or of another modality, by prompts."""

    label: str
    """The json field that holds the class."""
    classes: Path | None = None
    """A .json file that maps its values to names, or a text file whose line n names the value n.
    Unset: the values are the names."""
    templates: Annotated[Texts, Field(min_length=1)] = ("{}",)
    """Prompts, with {} for the name; a class is the mean of its prompts. One, or a list."""
    modality: str | None = None
    """What is classified. Unset: the run's first modality that is not text."""


class Neighbours(Settings):
    """Classification by the nearest training samples."""

    label: str
    """The json field that holds the class."""
    train: str | None = None
    """The set whose labels are known; the set itself leaves each sample out. Unset: the run's."""
    modality: str | None = None
    """image, text, or one of `towers.more`. Unset: the run's first, in that order."""
    tap: str = "head"
    """Where the towers are read: head, encoder (before the head), or a module's path."""
    width: int | None = Field(None, ge=1)
    """So many first coordinates of the vectors alone (Matryoshka). Unset: all."""
    k: int = Field(200, ge=1)
    temperature: float = Field(0.07, gt=0)
    """A neighbour's vote is exp(cosine / temperature)."""


class Probe(Settings):
    """A linear model on frozen embeddings."""

    label: str
    """The json field that holds the class, or the number."""
    kind: Literal["classification", "regression"] = "classification"
    """Whether labels are classes (logistic regression) or numbers (ridge regression)."""
    train: str | None = None
    """The set that it is fitted on. Unset: the run's."""
    modality: str | None = None
    """image, text, or one of `towers.more`. Unset: the run's first, in that order."""
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
    tap: Literal["head", "tokens"] | None = None
    """head: one vector a text; tokens: late interaction. Unset: tokens where the objective reads
    those of text, and not its vectors."""


class Languages(Settings):
    """Consistency over languages: retrieval in each, and MRV."""

    captions: Annotated[Texts, Field(min_length=2)]
    """The caption fields, one a language: [names.en, names.de]."""
    modality: str | None = None
    """What the captions are of. Unset: the run's first modality that is not text."""
    positives: str | None = None
    """The json field that right answers share; `none` for pairs alone. Unset: the run's."""


class Order(Settings):
    """Whether an image, or another modality, prefers its caption to one with the order of things
    changed."""

    against: Annotated[Texts, Field(min_length=1)]
    """The json fields that hold wrong captions. One, or a list."""
    modality: str | None = None
    """What the captions are of. Unset: the run's first modality that is not text."""
    captions: str | None = None
    """Where the right one is. Unset: where the run's captions are."""


class Table(Settings):
    """What the objective keeps of each sample that the run was trained on: temperatures, losses,
    how likely a pair is clean. --on names one of its sources."""

    label: str | None = None
    """A json field: the mean for each of its values, and how it goes with their frequency."""
    auc: str | None = None
    """A json field that is 1 or 0, such as whether a caption is the right one: how well each figure
    tells the two kinds apart."""


class BatchBias(Settings):
    """Whether a batch is large enough: how far the mean gradient of small ones is from that of all
    samples."""

    batch: int | None = Field(None, ge=2)
    """Pairs in a batch. Unset: the run's batch.global_size."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Share of the batch's own estimate in a sample's running one (SogCLR); 1: plain InfoNCE."""
    temperature: float | None = Field(None, gt=0)
    """Unset: that of the run's objective, as learnt."""
    samples: int = Field(1024, ge=4)
    """How many of the set stand for all data, by a keyed choice."""
    rounds: int = Field(40, ge=2)
    """How often these are gone through to average gradients."""
    between: tuple[str, str] | None = None
    """Two of the run's modalities. Unset: its first two, of image, text and `towers.more`."""
    positives: str | None = None
    """The json field of samples that are no negatives of each other; `none`: all are. Unset: the
    run's."""


class Trigger(Neighbours):
    """A backdoor: whether triggered samples are taken for the target class."""

    target: int | str
    """The class that the attack wants: a value of `label`."""
    triggered: str
    """The json field that is 1 where a sample bears the trigger, else 0."""


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
    "table": Table,
    "batch-bias": BatchBias,
    "trigger": Trigger,
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
    if not item["loc"]:  # of several keys together
        return f"{task}: {item['msg'].removeprefix('Value error, ')}."
    name = str(item["loc"][0])
    about = model.model_fields[name].description if name in model.model_fields else None
    what = "must be given" if item["type"] == "missing" else item["msg"]
    help_text = f" {' '.join(about.split())}" if about else ""
    return f"{task}: {name}: {what}.{help_text}"
