"""Read, resolve, compare and print a `Config`: defaults, then a YAML file, then `key=value`.

Unknown keys are refused with the nearest known one, so every key that a file sets is a key that
something reads.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.places import is_remote
from gigabatch.trainer.config import Config

ANY = "NAME"
"""Stands in known keys where the user chooses a name."""

RENAMED_KEYS = {
    "train.zero": "train.zero_stage",
    "train.clip": "train.max_grad_norm",
    "train.hang_after_s": "train.hang_timeout_s",
    "objective.schedule": "objective.gather_mode",
    "objective.scale": "objective.init_logit_scale",
}
"""Old key -> new key. Configs of earlier runs keep loading."""

logger = logging.getLogger(__name__)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides (values are YAML), and validate.

    Relative folders are taken from the working directory. Raises GigabatchError.
    """
    return resolve(parse_config(read_config(path), str(path), overrides))


def read_config(path: Path) -> str:
    """The text of a config file. Raises GigabatchError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise GigabatchError(f"{path}: the config cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise GigabatchError(f"{path}: not a config: it is not UTF-8 text.") from error


def parse_config(text: str, where: str, overrides: Sequence[str] = ()) -> Config:
    """A Config from YAML text and overrides; `where` names the text in errors."""
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise GigabatchError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise GigabatchError(f"{where}: a config is a mapping of sections, such as `train:`.")
    for override in overrides:
        _override(tree, override)
    _rename_old_keys(tree, where)
    _refuse_unknown(tree, where)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise GigabatchError(_explain(error, where)) from error


def resolve(config: Config) -> Config:
    """Fix what depends on this machine: absolute folders and the number of threads."""
    root = config.data.root
    elsewhere = root.startswith("demo:") or is_remote(root)
    data = root if elsewhere else str(Path(root).expanduser().absolute())
    sets = tuple(name if "/" not in name else _absolute_if_there(name) for name in config.eval.sets)
    cores = len(os.sched_getaffinity(0))
    threads = config.cluster.threads or max(1, cores // config.cluster.most)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": config.run.dir.expanduser().absolute()}),
            "data": config.data.model_copy(update={"root": data}),
            "towers": config.towers.with_absolute_paths(),
            "eval": config.eval.model_copy(update={"sets": sets}),
            "cluster": config.cluster.model_copy(update={"threads": threads}),
        }
    )


def _absolute_if_there(name: str) -> str:
    """Return the absolute path of a folder; another name may be one inside `data.root`."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name


def dump_config(config: Config) -> str:
    """YAML that `parse_config` reads back to the same Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a nested mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new)."""
    before, after = (dict(leaves(c.model_dump(mode="json"))) for c in (old, new))
    return {
        key: (before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    }


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise GigabatchError(f"{override!r}: an override is key=value, such as train.steps=100.")
    *path, last = key.split(".")
    for part in path:
        node = tree.setdefault(part, {})
        if node is None:
            node = tree[part] = {}
        if not isinstance(node, dict):
            raise GigabatchError(f"{override!r}: {part!r} is a value, not a section.")
        tree = node
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise GigabatchError(f"{override!r}: the value is not valid YAML.") from error


def _rename_old_keys(tree: dict[str, Any], where: str) -> None:
    """Replace each key of RENAMED_KEYS by its new name, in place, and log the new name. An
    objective's keys are also renamed in the terms of a sum."""
    for old, new in RENAMED_KEYS.items():
        section_name, _, old_name = old.partition(".")
        new_name = new.rpartition(".")[2]
        section = tree.get(section_name)
        if not isinstance(section, dict):
            continue
        terms = section.get("terms")
        for table in (section, *(terms if isinstance(terms, list) else ())):
            if not isinstance(table, dict) or old_name not in table:
                continue
            if new_name in table:
                raise GigabatchError(f"{where}: {old} is now {new}; give only {new}.")
            logger.warning("%s: %s is now called %s", where, old, new)
            table[new_name] = table.pop(old_name)


def _refuse_unknown(tree: Mapping[str, Any], where: str) -> None:
    known = set(known_keys(Config))
    sections = {".".join(key.split(".")[:n]) for key in known for n in range(1, key.count(".") + 1)}
    free = [key for key in known if key.endswith((".config", ".args", ".env"))]
    for given, _ in leaves(tree):
        key = re.sub(r"^(towers\.more)\.[^.]+", rf"\1.{ANY}", given)
        inside = any(key == f or key.startswith(f"{f}.") for f in free)
        if key in known or key in sections or inside:
            continue
        close = difflib.get_close_matches(key, sorted(known), 1, 0.6)
        last = key.rpartition(".")[2]
        close = close or [k for k in sorted(known) if k.rpartition(".")[2] == last][:1]
        hint = f" Did you mean {close[0]}?" if close else " `gigabatch config` prints all keys."
        raise GigabatchError(f"{where}: unknown key {given}.{hint}")


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a model accepts, over all kinds of tower; ANY for a name of the
    user's."""
    for name, info in model.model_fields.items():
        models = list(_models_in(info.annotation))
        own = f"{ANY}." if get_origin(info.annotation) is dict else ""
        for inner in models:
            yield from known_keys(inner, f"{prefix}{name}.{own}")
        if not models:
            yield f"{prefix}{name}"


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        path = list(item["loc"])
        # pydantic puts the kind of a tower, and the name of an objective, there
        if path[:1] == ["towers"]:
            at = 3 if path[1:2] == ["more"] else 2
            del path[at : at + 1]
            if path[3:4] in (["reads"], ["tower"]):
                del path[4:5]
        if path[:1] == ["objective"]:
            del path[1:2]
            if path[1:2] == ["terms"]:
                del path[3:4]
        key = ".".join(map(str, path))
        message = item["msg"].removeprefix("Value error, ")
        if path[:1] == ["objective"] and item["type"] == "extra_forbidden":
            name = item["loc"][-2]
            message = f"not a key of {name}; `gigabatch objectives {name}` tells its keys"
        given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
        lines.append(f"{key}: {message}{given}" if key else message)
    return f"{where}: " + f"\n{where}: ".join(lines)
