"""`gigabatch config`: print, list and explain configs."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.output import write
from gigabatch.launcher.recipes import find_config, recipe_summary, recipes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gigabatch.trainer.config.explain import KeyHelp

PIPE_WIDTH, WIDEST = 100, 100
INDENT = " " * 4


def config(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG", help="A YAML file, or a recipe such as quickstart (see --list)."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings that replace those of CONFIG; with --explain also keys to explain.",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Explain all keys, or only the given ones: meaning, type, default, value.",
        ),
    ] = False,
) -> None:
    """Print a config with every key, or explain its keys.

    Folders are absolute and cluster.threads is that of this machine.

    \b
    Examples:
      gigabatch config --list
      gigabatch config quickstart
      gigabatch config quickstart train.steps=100 > my.yaml
      gigabatch config quickstart --explain optimizer
      gigabatch config --explain train.epochs
    """
    words = [*([config] if config else []), *(overrides or [])]
    if list_:
        write("\n".join(_recipe_lines()) + "\n")
    elif explain:
        _print_explanation(words)
    elif not words:
        raise GigabatchError("config needs a CONFIG: a YAML file or a recipe. See --list.")
    else:
        path = find_config(words[0])
        from gigabatch.trainer.config.load import dump_config, load_config

        write(dump_config(load_config(path, words[1:])))


def _recipe_lines() -> list[str]:
    paths = recipes()
    width = max(map(len, paths))
    lines = []
    for name, path in paths.items():
        lines += textwrap.wrap(
            recipe_summary(path), PIPE_WIDTH, initial_indent=f"{name:{width}}  ",
            subsequent_indent=" " * (width + 2),
        )  # fmt: skip
    folder = next(iter(paths.values())).parent
    return [*lines, "", "Train one: gigabatch train NAME", f"Their files: {folder}"]


def _print_explanation(words: Sequence[str]) -> None:
    """Explain keys. The first word may be a CONFIG; others are keys or settings."""
    path: Path | None = None
    if words and "=" not in words[0]:
        try:
            path = find_config(words[0])
        except GigabatchError:
            if not _may_be_key(words):
                raise
    from gigabatch.trainer.config.explain import explain_keys
    from gigabatch.trainer.config.load import load_config, parse_config, resolve

    rest = words[1:] if path else words
    settings = [word for word in rest if "=" in word]
    names = [word for word in rest if "=" not in word]
    if path:
        config = load_config(path, settings)
    else:
        config = resolve(parse_config("", "the defaults", settings))
    is_terminal = sys.stdout.isatty()
    width = min(shutil.get_terminal_size().columns, WIDEST) if is_terminal else PIPE_WIDTH
    bold = is_terminal and "NO_COLOR" not in os.environ
    blocks = [_block(entry, width, bold) for entry in explain_keys(config, names)]
    write("\n\n".join(blocks) + "\n")


def _may_be_key(words: Sequence[str]) -> bool:
    """Return whether the first word, which is no config, may be meant as a key or a section."""
    first = words[0]
    if "/" in first or Path(first).suffix in (".yaml", ".yml"):
        return False
    if len(words) == 1 or re.fullmatch(r"\w+(\.\w+)+", first):
        return True
    from gigabatch.trainer.config import Config  # takes seconds

    return first in Config.model_fields


def _block(entry: KeyHelp, width: int, bold: bool) -> str:
    """Return `KEY = VALUE`, the meaning, and a line with type and default."""
    key = f"\x1b[1m{entry.key}\x1b[0m" if bold else entry.key
    head = key if entry.value is None else f"{key} = {entry.value}"
    facts = [
        entry.type,
        entry.default if entry.default == "required" else f"default {entry.default}",
    ]
    facts += [f"only with {entry.choice}"] if entry.choice else []
    paragraphs = [entry.meaning, f"[{'; '.join(facts)}]"]
    lines = [
        line
        for text in paragraphs
        for line in textwrap.wrap(
            text, width, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False
        )
    ]
    return "\n".join([head, *lines])
