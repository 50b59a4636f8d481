"""Values of keys that the configs of earlier versions' runs lack.

A run writes every key to its `config.yaml`. A key that is missing there is newer than the run. If
its default changes what a seed gives, the run keeps the older meaning, so that it resumes as it
began.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OLD_VALUES: Mapping[str, Any] = {"data.fields_version": 1}
"""Key -> its value in runs that began before the key existed."""


def old_run_overrides(tree: Mapping[str, Any]) -> list[str]:
    """Return overrides `key=value` for the keys that a run's config lacks.

    Args:
        tree: Contents of the run's `config.yaml`.
    """
    return [f"{key}={value}" for key, value in OLD_VALUES.items() if not _has(tree, key)]


def _has(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True
