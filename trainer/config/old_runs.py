"""Values of keys that the run folders of earlier versions lack.

A run writes every key to its `config.yaml`, so a key that is missing there is newer than the run.
If the key pins how a value is computed, the run keeps the meaning that it began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

OLD_VALUES: Mapping[str, Any] = {"data.fields_version": 1, "data.image.version": 1}
"""Key -> its value in runs that began before the key existed."""


def old_run_overrides(text: str) -> list[str]:
    """Return overrides `key=value` for the keys that the `config.yaml` of a run lacks."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return []  # reported where the config is parsed
    return [f"{key}={value}" for key, value in OLD_VALUES.items() if not _has(tree, key)]


def _has(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True
