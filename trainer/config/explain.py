"""Explanations of config keys: meaning, type, default and value, read from the settings classes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.keys import (
    ANY,
    generic,
    models_in,
    nearest,
    select,
    selector_of,
    tags_of,
)
from gigabatch.trainer.config.overrides import RENAMED_KEYS

logger = logging.getLogger(__name__)

REQUIRED = "required"
TYPE_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


@dataclass(frozen=True)
class KeyHelp:
    """One config key.

    Attributes:
        key: Dotted name, such as `train.steps`.
        meaning: One or more sentences.
        type: Accepted values in words, such as `integer >= 1`.
        default: Default as YAML, or `required`.
        value: Value in a config as YAML; None without a config.
        choice: Kind that has this key, such as `towers.image.kind=conv`; empty if all have it.
    """

    key: str
    meaning: str
    type: str
    default: str
    value: str | None = None
    choice: str = ""


def explain_keys(config: Config | None, names: Sequence[str] = ()) -> list[KeyHelp]:
    """Explain the keys of a config, in the order of the settings.

    Args:
        config: Config whose kinds and values are shown; None explains all kinds.
        names: Keys or sections, such as `train` or `towers.image.kind`; empty means all.

    Returns:
        The keys. A name that the config's own kinds lack is explained for the kinds that have it.

    Raises:
        GigabatchError: if no kind has a key of this name.
    """
    everything = list(_describe(Config))
    shown = list(_describe(Config, config)) if config else everything
    if not names:
        return shown
    keys: list[KeyHelp] = []
    for given in names:
        name = RENAMED_KEYS.get(given, given)
        if name != given:
            logger.warning("%s is now called %s", given, name)
        matches = [entry for entry in shown if _is_in(entry.key, name)]
        matches = matches or [entry for entry in everything if _is_in(entry.key, generic(name))]
        if not matches:
            meant = nearest(name, (entry.key for entry in shown))
            hint = f"Did you mean {meant}?" if meant else "`gigabatch config --explain` lists all."
            raise GigabatchError(f"{name}: there is no such config key. {hint}")
        keys += matches
    return keys


def _is_in(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _describe(
    model: type[BaseModel], value: BaseModel | None = None, prefix: str = "", choice: str = ""
) -> Iterator[KeyHelp]:
    """Yield the keys of a settings class, of the kinds that `value` uses, or else of all kinds."""
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        current = getattr(value, name) if value is not None else None
        models = models_in(info.annotation)
        if not (models and _is_section(info.annotation)):
            shown = None if value is None else _yaml(current)
            yield KeyHelp(key, _meaning(info), _type_text(info), _default(info), shown, choice)
        if isinstance(current, BaseModel):
            selector = selector_of(models)
            for entry in _describe(type(current), current, f"{key}.", choice):
                is_selector = selector and entry.key == f"{key}.{selector}"
                yield _with_all_tags(entry, models) if is_selector else entry
        elif isinstance(current, dict) and models:
            for item, inner in current.items():
                yield from _describe(type(inner), inner, f"{key}.{item}.", choice)
        elif value is None:
            item = f"{ANY}." if get_origin(info.annotation) is dict else ""
            yield from _describe_kinds(models, f"{key}.{item}", choice)


def _with_all_tags(entry: KeyHelp, models: Sequence[type[BaseModel]]) -> KeyHelp:
    """Return the entry of a selector with the values of all kinds, and the default kind."""
    selector = entry.key.rpartition(".")[2]
    tags = [tag for model in models for tag in tags_of(model, selector)]
    default = select(models, selector, None)
    first = tags_of(default, selector)[0] if default else REQUIRED
    return replace(entry, type=f"one of {', '.join(tags)}", default=first)


def _describe_kinds(
    models: Sequence[type[BaseModel]], prefix: str, choice: str
) -> Iterator[KeyHelp]:
    selector = selector_of(models)
    for model in models:
        if selector:
            if prefix == "objective.terms.":  # each term has the keys of that objective
                return
            kind = f"{prefix}{selector}={' or '.join(tags_of(model, selector))}"
            yield from _describe(model, None, prefix, kind)
        else:
            yield from _describe(model, None, prefix, choice)


def _is_section(annotation: Any) -> bool:
    """Return whether values of this type are always mappings with known keys."""
    if get_origin(annotation) is Annotated:
        return _is_section(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return all(map(_is_section, get_args(annotation)))
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _meaning(info: FieldInfo) -> str:
    return " ".join((info.description or "").split())


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return REQUIRED
    return _yaml(info.get_default(call_default_factory=True))


def _yaml(value: Any) -> str:
    """Return a value as one line of YAML."""
    tree = to_jsonable_python(value)
    text = yaml.safe_dump(tree, default_flow_style=True, sort_keys=False, width=1 << 20)
    return text.removesuffix("\n").removesuffix("\n...")


def _type_text(info: FieldInfo) -> str:
    return _type_words(info.annotation, info.metadata)


def _type_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return a type in words, such as `integer >= 1`, `one of fp32, bf16` or `list of text`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *extra = arguments
        return _type_words(inner, [*metadata, *extra])
    if origin in (Union, UnionType):
        words = [_type_words(inner, metadata) for inner in arguments if inner is not NoneType]
        words += ["null"] if NoneType in arguments else []
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {_type_words(arguments[0])}"
        return f"[{', '.join(map(_type_words, arguments))}]"
    if origin is dict or models_in(annotation):
        return "mapping"
    constraints = [
        constraint
        for item in metadata
        for constraint in (item.metadata if isinstance(item, FieldInfo) else [item])
    ]
    bounds = [
        f"{sign} {bound}"
        for name, sign in BOUNDS
        for constraint in constraints
        if (bound := getattr(constraint, name, None)) is not None
    ]
    return " ".join([TYPE_NAMES.get(annotation, "any value"), ", ".join(bounds)]).strip()
