"""Functions that read, resolve, compare and print a `Config`.

Values come from the defaults, then from a YAML file, then from `key=value` overrides. Unknown keys
are rejected, and the message suggests the nearest known key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gigabatch.data.errors import GigabatchError
from gigabatch.data.imports import OBJECT_PATH
from gigabatch.data.remote.locations import is_remote
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.keys import (
    generic,
    known_keys,
    models_at,
    nearest,
    select,
    selected_keys,
    selector_of,
)
from gigabatch.trainer.config.names import suggest_kind, suggest_objective
from gigabatch.trainer.config.overrides import apply_overrides
from gigabatch.trainer.config.strict_yaml import DuplicateKeyError, load_yaml

FREE_FORM = (".config", ".args", ".env")
"""Suffixes of keys whose value is a free-form mapping."""

VALUES_OF_OLD_RUNS: dict[str, Any] = {"data.image.version": 1, "data.fields_version": 1}
"""Key -> value in runs whose config.yaml lacks it, because they began before the key existed."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, validate and resolve.

    Args:
        path: YAML file.
        overrides: Strings `key=value`; values are YAML.

    Returns:
        The config, with absolute folders and the number of threads of this machine.

    Raises:
        GigabatchError: if the file cannot be read, or a key or value is wrong.
    """
    return resolve(parse_config(read_config(path), str(path), overrides))


def read_config(path: Path) -> str:
    """Return the text of a config file.

    Raises:
        GigabatchError: if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise GigabatchError(f"{path}: the config cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise GigabatchError(f"{path}: not a config: it is not UTF-8 text.") from error


def parse_config(text: str, where: str, overrides: Sequence[str] = ()) -> Config:
    """Validate YAML text with overrides applied; folders stay as they are written.

    Args:
        text: YAML.
        where: Name of the text, for messages.
        overrides: Strings `key=value`; values are YAML.

    Raises:
        GigabatchError: if a key or value is wrong.
    """
    return _validate(_parse_yaml(text, where), where, overrides)


def parse_run_config(text: str, where: str, overrides: Sequence[str] = ()) -> Config:
    """Validate the config.yaml of a run folder, or of its copy, with overrides applied.

    A run keeps the steps it began with: a key that older versions did not write has the value of
    those versions, not the default of new runs.

    Args:
        text: YAML.
        where: Name of the text, for messages.
        overrides: Strings `key=value`; values are YAML.

    Raises:
        GigabatchError: if a key or value is wrong.
    """
    tree = _parse_yaml(text, where)
    for key, value in VALUES_OF_OLD_RUNS.items():
        *path, last = key.split(".")
        section: Any = tree
        for name in path:
            if isinstance(section, dict):
                section[name] = section.get(name) or {}
                section = section[name]
        if isinstance(section, dict):  # `_validate` rejects anything else
            section.setdefault(last, value)
    return _validate(tree, where, overrides)


def _parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        tree = load_yaml(text) or {}
    except DuplicateKeyError as error:
        raise GigabatchError(f"{where}: {error}") from error
    except yaml.YAMLError as error:
        raise GigabatchError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise GigabatchError(f"{where}: a config is a mapping of sections, such as `train:`.")
    return tree


def _validate(tree: dict[str, Any], where: str, overrides: Sequence[str]) -> Config:
    apply_overrides(tree, overrides, where)
    _reject_unknown(tree, where)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise GigabatchError(_explain(error, where)) from error


def resolve(config: Config) -> Config:
    """Return the config with absolute folders and the number of threads filled in.

    Relative folders are taken from the working directory.
    """
    root = config.data.root
    is_elsewhere = root.startswith("demo:") or is_remote(root)
    data = root if is_elsewhere else str(Path(root).expanduser().absolute())
    sets = tuple(name if "/" not in name else _absolute_folder(name) for name in config.eval.sets)
    cores = len(os.sched_getaffinity(0))
    threads = config.cluster.threads or max(1, cores // config.cluster.max_workers)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": config.run.dir.expanduser().absolute()}),
            "data": config.data.model_copy(update={"root": data}),
            "towers": config.towers.with_absolute_paths(),
            "eval": config.eval.model_copy(update={"sets": sets}),
            "cluster": config.cluster.model_copy(update={"threads": threads}),
        }
    )


def _absolute_folder(name: str) -> str:
    """Return the absolute path of a folder that exists; other names are relative to the root."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name


def dump_config(config: Config) -> str:
    """Return YAML that `parse_config` reads back to the same Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of a nested mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, with (old, new)."""
    before, after = (dict(leaves(c.model_dump(mode="json"))) for c in (old, new))
    return {
        key: (before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    }


def _reject_unknown(tree: Mapping[str, Any], where: str) -> None:
    """Raise GigabatchError for the first key that no kind of any section has.

    It suggests a key of the kinds that the config selects.
    """
    known = set(known_keys(Config))
    sections = {".".join(key.split(".")[:n]) for key in known for n in range(1, key.count(".") + 1)}
    free = [key for key in known if key.endswith(FREE_FORM)]
    for given, _ in leaves(tree):
        key = generic(given)
        is_inside = any(key == f or key.startswith(f"{f}.") for f in free)
        if key in known or key in sections or is_inside:
            continue
        meant = nearest(given, selected_keys([Config], tree))
        hint = f" Did you mean {meant}?" if meant else " `gigabatch config --explain` lists all."
        raise GigabatchError(f"{where}: unknown key {given}.{hint}")


def _explain(error: ValidationError, where: str) -> str:
    """Return one line per error: the dotted key, what is wrong, and what fixes it."""
    errors = error.errors()
    deepest = {item["loc"] for item in errors}
    lines = []
    for item in errors:
        # A list whose only item is wrong is also reported as too short.
        inside = any(loc[: len(item["loc"])] == item["loc"] for loc in deepest - {item["loc"]})
        if not (item["type"] == "too_short" and inside):
            lines.append(f"{where}: {_explain_one(item)}")
    return "\n".join(lines)


def _explain_one(error: ErrorDetails) -> str:
    place = _place_of(error["loc"])
    key, context = place.key, error.get("ctx", {})
    message = error["msg"].removeprefix("Value error, ")
    shown = repr(error["input"])
    value = "" if isinstance(error["input"], dict) or shown in message else f" (given: {shown})"
    match error["type"]:
        case "union_tag_invalid":
            tag = str(context["tag"])
            tags = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
            key = f"{key}.{place.selector}"
            if place.selector == "name":
                message = f"there is no objective {tag!r}. {suggest_objective(tag)}"
            else:
                message = f"there is no kind {tag!r}. {suggest_kind(tag, tags)}"
        case "union_tag_not_found":
            message = f"`{place.selector}` is missing; it chooses the kind"
        case "missing":
            place = replace(_place_of(error["loc"][:-1]), key=key)
            message = f"is missing; {place.choice or place.key.rpartition('.')[0]} needs it"
            message += f": {meaning}" if (meaning := _meaning(place)) else ""
        case "extra_forbidden" if place.kind == "module" and place.selector == "name":
            name = key.removeprefix(f"{place.section}.")
            message = (
                f"not a key of {place.choice}, which has module and args. A key of your own class "
                f"goes into args: {place.section}.args.{name}"
            )
        case "extra_forbidden" if place.kind and place.selector == "name":
            message = (
                f"not a key of {place.kind}; `gigabatch objectives {place.kind}` lists its keys"
            )
        case "extra_forbidden" if place.kind:
            message = f"not a key of {place.choice}"
        case "string_pattern_mismatch" if context["pattern"] == OBJECT_PATH:
            message = "is not of the form package.mod:Class"
        case "value_error" if place.kind and key == place.section:
            message = f"with {place.choice}, {message}"
    return f"{key}: {message}{value}" if key else message


@dataclass(frozen=True)
class _Place:
    """Location of an error: its dotted key, and the innermost section that has kinds."""

    key: str
    section: str = ""
    kind: str | None = None

    @property
    def selector(self) -> str:
        return "name" if self.section.startswith("objective") else "kind"

    @property
    def choice(self) -> str:
        return f"{self.section}.{self.selector}={self.kind}" if self.kind else ""


def _place_of(location: Sequence[int | str]) -> _Place:
    """Convert pydantic's location of an error, which has the tag of a kind after its section."""
    key: list[str] = []
    place = _Place("")
    parts = iter(map(str, location))
    for part in parts:
        key.append(part)
        if selector_of(models_at(Config, ".".join(key))):
            tag = next(parts, None)
            if tag and tag.isdecimal():  # an item of a list
                key.append(tag)
                tag = next(parts, None)
            place = _Place("", ".".join(key), tag)
    return replace(place, key=".".join(key))


def _meaning(place: _Place) -> str:
    """Return the meaning of a missing key; empty if it has none."""
    models = models_at(Config, place.section)
    model = select(models, place.selector, place.kind) if place.kind else None
    info = model.model_fields.get(place.key.rpartition(".")[2]) if model else None
    return " ".join((info.description or "").split()) if info else ""
