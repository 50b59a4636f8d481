"""Read the texts of a sample, and choose the captions that a step uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from gigabatch.data.errors import BadSample, brief
from gigabatch.data.rng import key
from gigabatch.data.settings import Settings


class TextLocation(Settings):
    """Location of a sample's text."""

    member: str = "txt"
    """Extension of the member that holds the text; `json` if `field` is set."""
    field: str | None = None
    """Field of the json member that holds the text: a name, or a path such as `names.en`. Its
    value is a text, a list of texts, or a mapping whose values are texts."""
    lines: bool = False
    """Treat every line of a text as a separate text."""
    prefix: str = ""
    """Text to put before every text, such as `query: `."""

    @model_validator(mode="before")
    @classmethod
    def _field_implies_json(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("field") is not None:
            return {"member": "json", **values}
        return values


class ExtraText(TextLocation):
    """A text of a sample in addition to its captions. If there are several, the first is used."""

    length: int | None = Field(None, ge=2)
    """Maximum number of tokens of a text, including the end token; longer texts are truncated.
    Unset: the value of `data.text.length`."""


class CaptionSettings(TextLocation):
    """Location of captions, and the choice among several."""

    choose: Literal["first", "random", "all"] = "first"
    """Captions to use: `first`; `random`, redrawn each step; `all`, every caption a positive."""
    most: int = Field(5, ge=1)
    """Maximum number of captions of a sample to use with `choose: all`."""


class MissingCaption(BadSample):
    """Raised if a sample has no caption or only empty ones.

    It is not an error if modalities may be missing.
    """


def read_captions(
    data: bytes, settings: TextLocation, where: str, ordered: bool = False
) -> list[str]:
    """Read the texts of a member.

    Args:
        data: Contents of the member.
        settings: Location of the texts in it.
        where: Name of the sample, for error messages.
        ordered: Whether the first text differs from the others in meaning, as a positive from its
            negatives. Then it must exist, and a mapping, which has no order, is rejected.

    Returns:
        One or more texts, stripped and prefixed, without empty ones. Texts of a mapping are sorted
        by name.

    Raises:
        MissingCaption: if there is no text, or if `ordered` and the first is empty.
        BadSample: if the texts cannot be read.
    """
    subject = f"{where}: its caption ({settings.field or settings.member})"
    try:
        value: Any = data.decode("utf-8-sig")
        if settings.field is not None:
            value = value_at(json.loads(value), settings.field)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{subject} cannot be read: {error}.") from error
    if isinstance(value, dict) and ordered:
        raise BadSample(
            f"{subject} is a mapping, which has no order, but the objective takes the first text "
            "as the positive. Write a list, the positive first."
        )
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    if isinstance(value, str):
        value = value.splitlines() if settings.lines else [value]
    if not isinstance(value, list | None) or not all(
        isinstance(text, str | None) for text in value or ()
    ):
        raise BadSample(f"{subject} is not text: {brief(value)}.")
    texts = [(text or "").strip() for text in value or ()]
    captions = [text for text in texts if text]
    if not captions:
        raise MissingCaption(f"{subject} is empty.")
    if ordered and not texts[0]:
        raise MissingCaption(
            f"{subject} is empty at its first position, where the objective expects the positive."
        )
    if not all(map(_is_unicode, captions)):
        raise BadSample(f"{subject} contains half a surrogate pair, which no tokenizer accepts.")
    return [settings.prefix + caption for caption in captions]


def value_at(record: Any, path: str) -> Any:
    """Return a field of a json value by name, or else by path; None if it is missing.

    Raises:
        ValueError: if a part of the path is not a mapping.
    """
    if isinstance(record, dict) and path in record:
        return record[path]
    for name in path.split("."):
        if record is None:
            return None
        if not isinstance(record, dict):
            raise ValueError(f"expected a mapping with {name!r}, got {brief(record)}")
        record = record.get(name)
    return record


def _is_unicode(text: str) -> bool:
    """Return False for text with half a surrogate pair, which JSON can express but UTF-8 cannot."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def choose_caption(captions: Sequence[str], rng_key: int) -> str:
    """Draw one caption, all equally likely."""
    return captions[key(rng_key, "which") % len(captions)]
