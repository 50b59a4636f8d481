"""Recipes of the installed package, and lookup of the config file that an argument names.

Imports nothing heavy, so that a wrong name is reported before torch is imported.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import yaml

import gigabatch.configs
from gigabatch.data.errors import GigabatchError


def recipes() -> dict[str, Path]:
    """Return the YAML file of every recipe of the installed package, by name, sorted."""
    folder = Path(gigabatch.configs.__file__).parent
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_summary(path: Path) -> str:
    """Return the first sentence of a recipe's leading comment."""
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        comment.append(text)
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(comment), maxsplit=1)[0]


def find_config(name: str) -> Path:
    """Return the config file of a name: a file, or else a recipe such as `quickstart`.

    Raises:
        GigabatchError: if there is neither; the message suggests the nearest name.
    """
    path, known = Path(name), recipes()
    is_folder = os.path.isdir(name)  # `Path.is_dir` raises for a name longer than a path may be
    if os.path.exists(name) and not is_folder:
        if name in known:
            _check_not_empty(path)
        return path
    stem = name.removesuffix(".yaml")
    if stem in known:
        return known[stem]
    if os.path.exists(path / "config.yaml"):
        raise GigabatchError(
            f"{name}: is a run folder, not a config file. `gigabatch resume {name}` continues the "
            f"run; {path / 'config.yaml'} is its config."
        )
    if is_folder:
        raise GigabatchError(f"{name}: is a folder. Name a YAML file, or a recipe.{_LIST}")
    shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
    raise GigabatchError(f"{shown}: there is no such config file or recipe.{_suggest(path)}{_LIST}")


LONGEST_NAME = 200
_LIST = " `gigabatch config --list` lists the recipes."


def _check_not_empty(path: Path) -> None:
    """Raise GigabatchError if a file that hides a recipe sets no key."""
    try:
        is_empty = os.path.isfile(path) and not yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError):
        return  # reported when the config is read
    if is_empty:
        raise GigabatchError(
            f"{path}: this file of the working folder is empty and hides the recipe {path}. Remove "
            "or rename it, or name a config by its path, such as my.yaml."
        )


def _suggest(path: Path) -> str:
    """Return " Did you mean ...?" for the nearest file of the same folder or the nearest recipe."""
    try:
        nearby = [file for suffix in ("yaml", "yml") for file in path.parent.glob(f"*.{suffix}")]
    except OSError:  # a path that is too long, or a folder that cannot be read
        nearby = []
    files = difflib.get_close_matches(path.name, [file.name for file in nearby], 1, 0.75)
    names = difflib.get_close_matches(path.stem, recipes(), 1)
    if files:
        return f" Did you mean {path.parent / files[0]}?"
    return f" Did you mean the recipe {names[0]}?" if names else ""
