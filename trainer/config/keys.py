"""The keys that a config accepts, read from the settings classes.

A key is dotted, such as `train.steps`. Where a section has several kinds (`towers.image`, chosen by
`kind`; `objective`, chosen by `name`), each kind is a class with its own keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

ANY = "NAME"
"""Placeholder in keys for a name that the user chooses, as in `towers.more.NAME`."""
DEFAULT_TAGS = {"kind": "conv", "name": "infonce"}
"""Field that selects one of several kinds by a literal value -> the default value."""

Models = Sequence[type[BaseModel]]


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key that a settings class accepts, for all kinds; keys may repeat."""
    for name, info in model.model_fields.items():
        models = models_in(info.annotation)
        item = f"{ANY}." if get_origin(info.annotation) is dict else ""
        for inner in models:
            yield from known_keys(inner, f"{prefix}{name}.{item}")
        if not models:
            yield f"{prefix}{name}"


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings classes in a type, such as those of a union or of a list's items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def models_at(root: type[BaseModel], section: str) -> list[type[BaseModel]]:
    """Return the settings classes of a section, such as those of all kinds of `towers.image`."""
    models, skip = [root], False
    for part in section.split("."):
        if skip or part.isdecimal():  # a name that the user chooses, or the number of a list's item
            skip = False
            continue
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        models = [model for field in fields for model in models_in(field.annotation)]
        skip = any(get_origin(field.annotation) is dict for field in fields)
    return [] if skip else models


def selector_of(models: Models) -> str | None:
    """Return the field that chooses between several classes; None if there is no such field."""
    for name in DEFAULT_TAGS:
        if len(models) > 1 and all(tags_of(model, name) for model in models):
            return name
    return None


def tags_of(model: type[BaseModel], selector: str) -> tuple[str, ...]:
    """Return the selector's values that mean this class, such as ("conv",)."""
    info = model.model_fields.get(selector)
    is_literal = info is not None and get_origin(info.annotation) is Literal
    return get_args(info.annotation) if info is not None and is_literal else ()


def select(models: Models, selector: str, tag: Any) -> type[BaseModel] | None:
    """Return the class that a tag selects.

    Returns the default class if `tag` is None, or None if no class has the tag.
    """
    wanted = DEFAULT_TAGS[selector] if tag is None else tag
    return next((model for model in models if wanted in tags_of(model, selector)), None)


def generic(key: str) -> str:
    """Replace the user's name in a key: `towers.more.sound.rate` -> `towers.more.NAME.rate`."""
    return re.sub(r"^(towers\.more)\.[^.]+", rf"\1.{ANY}", key)


def tag_in(section: Mapping[str, Any], selector: str) -> Any:
    """Return the tag in a section of a config; None selects the default class.

    Without a name, a user's own module implies `name: module`.
    """
    implied = "module" if selector == "name" and "module" in section else None
    return section.get(selector, implied)


def selected_keys(models: Models, section: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of the kinds that a section of a config selects; keys may repeat."""
    section = section if isinstance(section, Mapping) else {}
    if selector := selector_of(models):
        chosen = select(models, selector, tag_in(section, selector))
        models = [chosen] if chosen else models
    for model in models:
        for name, info in model.model_fields.items():
            inner, origin = models_in(info.annotation), get_origin(info.annotation)
            if not inner or origin in (tuple, list):
                yield f"{prefix}{name}"
            elif origin is dict:
                for item, value in (section.get(name) or {ANY: None}).items():
                    yield from selected_keys(inner, value, f"{prefix}{name}.{item}.")
            else:
                yield from selected_keys(inner, section.get(name), f"{prefix}{name}.")


def nearest(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that a misspelled one most likely means.

    That is one of the same name in another section, else one of a similar name in its section,
    else, if there is no such section, one that is similar as a whole.
    """
    names = sorted(set(known))
    section, _, last = key.rpartition(".")
    elsewhere = [name for name in names if name.rpartition(".")[2] == last]
    if elsewhere:
        return difflib.get_close_matches(key, elsewhere, 1, 0.0)[0]
    siblings = {
        name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section
    }
    if close := difflib.get_close_matches(last, siblings, 1, 0.6):
        return siblings[close[0]]
    is_section = any(name.startswith(f"{section}.") for name in names)
    close = [] if is_section else difflib.get_close_matches(key, names, 1, 0.6)
    return close[0] if close else None
