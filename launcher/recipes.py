"""Recipes of the installed package, and lookup of the config file that an argument names.

Imports nothing heavy, so that a wrong name is reported before torch is imported.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

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
    path = Path(name)
    if os.path.exists(name) and not path.is_dir():
        return path
    known = recipes()
    stem = name.removesuffix(".yaml")
    if stem in known:
        return known[stem]
    if (path / "config.yaml").exists():
        raise GigabatchError(
            f"{name}: is a run folder, not a config file. `gigabatch resume {name}` continues the "
            f"run; {path / 'config.yaml'} is its config."
        )
    if path.is_dir():
        raise GigabatchError(f"{name}: is a folder. Name a YAML file, or a recipe.{_LIST}")
    raise GigabatchError(f"{name}: there is no such config file or recipe.{_suggest(path)}{_LIST}")


_LIST = " `gigabatch config --list` lists the recipes."


def _suggest(path: Path) -> str:
    """Return " Did you mean ...?" for the nearest file of the same folder or the nearest recipe."""
    nearby = [file for suffix in ("yaml", "yml") for file in path.parent.glob(f"*.{suffix}")]
    files = difflib.get_close_matches(path.name, [file.name for file in nearby], 1, 0.75)
    names = difflib.get_close_matches(path.stem, recipes(), 1)
    if files:
        return f" Did you mean {path.parent / files[0]}?"
    return f" Did you mean the recipe {names[0]}?" if names else ""
