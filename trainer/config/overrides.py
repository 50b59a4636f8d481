"""Overrides of config keys: `key=value`, applied to the tree of a YAML file before validation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.keys import models_at, select, selector_of, tag_in, tags_of
from gigabatch.trainer.config.strict_yaml import DuplicateKeyError, load_yaml

Tree = dict[str, Any]

RENAMED_KEYS = {
    "train.zero": "train.zero_stage",
    "train.clip": "train.max_grad_norm",
    "train.hang_after_s": "train.hang_timeout_s",
    "objective.schedule": "objective.gather_mode",
    "objective.scale": "objective.init_logit_scale",
}
"""Old key -> new key. Configs of earlier runs keep loading."""
EXCLUSIVE_KEYS = {"train.steps": "train.epochs", "train.epochs": "train.steps"}
"""Key -> key that an override of the first removes from the config."""

logger = logging.getLogger(__name__)


def apply_overrides(tree: Tree, overrides: Sequence[str], where: str) -> None:
    """Set keys in a config's tree, in place; values are YAML.

    An override of a selector (`towers.image.kind`, `objective.name`) also removes the file's keys
    that belong to the old kind and logs their names. Keys that an earlier override set stay. An
    override of `objective.module` implies `objective.name=module`.

    Args:
        tree: Nested mapping of a config file, changed in place.
        overrides: Strings `key=value`.
        where: Name of the file, for messages.

    Raises:
        GigabatchError: for a malformed override, or a key below one that is not a section.
    """
    rename_old_keys(tree, where)
    done: list[str] = []
    for override in overrides:
        key, value = _parse(override)
        if key in RENAMED_KEYS:
            logger.warning("%s: %s is now called %s", override, key, RENAMED_KEYS[key])
            key = RENAMED_KEYS[key]
        other = EXCLUSIVE_KEYS.get(key)
        if other and other not in done and value is not None:
            _remove(tree, other)
        if key == "train.steps" and value is None:  # train.epochs sets the number of steps
            _remove(tree, key)
        else:
            if key == "objective.module" and value and "objective.name" not in done:
                _drop_old_kind(tree, "objective.name", "module", done)
                _remove(tree, "objective.name")  # the module implies it
            _drop_old_kind(tree, key, value, done)
            _set(tree, key, value, override)
        done.append(key)
    rename_old_keys(tree, where)  # an override may set a section: objective={scale: 10}


def _parse(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise GigabatchError(f"{override!r}: an override is key=value, such as train.steps=100.")
    try:
        return key, load_yaml(text)
    except DuplicateKeyError as error:
        raise GigabatchError(f"{override!r}: {error}") from error
    except yaml.YAMLError as error:
        raise GigabatchError(f"{override!r}: the value is not valid YAML.") from error


def _set(tree: Tree, key: str, value: Any, override: str) -> None:
    *path, last = key.split(".")
    for part in path:
        node = tree.setdefault(part, {})
        if node is None:
            node = tree[part] = {}
        if not isinstance(node, dict):
            raise GigabatchError(f"{override!r}: {part!r} is a value, not a section.")
        tree = node
    tree[last] = value


def _section(tree: Tree, path: str) -> Tree | None:
    """Return the mapping at a dotted path; None if there is none."""
    node: Any = tree
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None


def _remove(tree: Tree, key: str) -> None:
    path, _, last = key.rpartition(".")
    section = _section(tree, path)
    if section is not None:
        section.pop(last, None)


def _drop_old_kind(tree: Tree, key: str, value: Any, done: Sequence[str]) -> None:
    """Remove the keys of the old kind from a section whose selector is about to change.

    A key stays if both kinds have it with the same type and default, or if an override set it.
    """
    path, _, name = key.rpartition(".")
    models = models_at(Config, path) if path else []
    section = _section(tree, path) if path else None
    if section is None or name != selector_of(models):
        return
    old = select(models, name, tag_in(section, name))
    new = select(models, name, value)
    if old is None or new is None or old is new:
        return
    dropped = [
        field
        for field in section
        if field != name
        and _belongs_to(field, old, new)
        and not any(k == f"{path}.{field}" or k.startswith(f"{path}.{field}.") for k in done)
    ]
    for field in dropped:
        del section[field]
    if dropped:
        keys = ", ".join(f"{path}.{field}" for field in dropped)
        logger.warning("%s=%s: dropped %s, set for %s", key, value, keys, tags_of(old, name)[0])


def _belongs_to(field: str, old: type[BaseModel], new: type[BaseModel]) -> bool:
    """Return whether a field applies only to the old kind.

    That is, the new kind lacks it, or gives it a different type or default.
    """
    before, after = old.model_fields.get(field), new.model_fields.get(field)
    if before is None:
        return False  # an unknown key, to be rejected as such
    if after is None:
        return True
    return (before.annotation, before.default) != (after.annotation, after.default)


def rename_old_keys(tree: Tree, where: str) -> None:
    """Replace each key of RENAMED_KEYS by its new name, in place, and log the new name.

    An objective's keys are also renamed in the terms of a sum.
    """
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
                raise GigabatchError(f"{where}: {old} is now called {new}; set only {new}.")
            logger.warning("%s: %s is now called %s", where, old, new)
            table[new_name] = table.pop(old_name)
