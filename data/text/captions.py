"""The texts of a sample: one caption, several, or translations; and which of them a step sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from gigabatch.data.errors import BadSample
from gigabatch.data.rng import key
from gigabatch.data.settings import Settings


class TextPlace(Settings):
    """Where a sample's text is."""

    member: str = "txt"
    """The member's extension: a text, or `json`, which a `field` implies."""
    field: str | None = None
    """For json: a field, or a path such as `names.en`; a text, a list, or a mapping of texts."""
    lines: bool = False
    """Each line of a text is a text of its own."""
    prefix: str = ""
    """Put before each text, such as `query: `."""

    @model_validator(mode="before")
    @classmethod
    def _field_of_json(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("field") is not None:
            return {"member": "json", **values}
        return values


class OneText(TextPlace):
    """A further text of a sample: of several, the first."""

    length: int | None = Field(None, ge=2)
    """Tokens, end mark included; longer texts are cut. Unset: `data.text.length`."""


class CaptionSettings(TextPlace):
    """Where captions are, and which of several is taken."""

    choose: Literal["first", "random", "all"] = "first"
    """Of several: the first; one by chance at each step; or all, as so many right answers."""
    most: int = Field(5, ge=1)
    """all: captions a sample at most."""


class NoCaption(BadSample):
    """A sample whose caption is missing or empty; where modalities may be missing, no fault."""


def read_captions(data: bytes, settings: TextPlace, where: str) -> list[str]:
    """The texts in a member, stripped, prefixed, at least one; a mapping's in the order of its
    names.

    Raises BadSample for what cannot be read, NoCaption where there is none.
    """
    what = f"{where}: its caption ({settings.field or settings.member})"
    try:
        found: Any = data.decode("utf-8-sig")
        if settings.field is not None:
            found = value_at(json.loads(found), settings.field)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{what} cannot be read: {error}.") from error
    if isinstance(found, dict):
        found = [found[name] for name in sorted(found)]
    if isinstance(found, str):
        found = found.splitlines() if settings.lines else [found]
    if not isinstance(found, list | None) or not all(
        isinstance(p, str | None) for p in found or ()
    ):
        raise BadSample(f"{what} is not text: {found!r:.60}.")
    captions = [part.strip() for part in found or () if part and part.strip()]
    if not captions:
        raise NoCaption(f"{what} is empty.")
    if not all(map(_is_unicode, captions)):
        raise BadSample(f"{what} holds half a surrogate pair, which no tokeniser takes.")
    return [settings.prefix + caption for caption in captions]


def value_at(record: Any, path: str) -> Any:
    """The value of a field, by its name or else by its path; None where there is none."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for name in path.split("."):
        if record is None:
            return None
        if not isinstance(record, dict):
            raise ValueError(f"what should hold {name!r} is {record!r:.60}")
        record = record.get(name)
    return record


def _is_unicode(text: str) -> bool:
    """False for what only JSON's escapes can spell: a surrogate alone, which UTF-8 cannot hold."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def choose_caption(captions: Sequence[str], stream: int) -> str:
    """One of them, by the key `stream`, all as likely."""
    return captions[key(stream, "which") % len(captions)]
