"""`gigabatch objectives`: list and explanations of the objectives, read from their classes."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cli.arguments import JSON_HELP
from gigabatch.launcher.output import write

if TYPE_CHECKING:
    from gigabatch.trainer.objectives.settings import ObjectiveSettings

WIDTH = 96
HINT = """Explain one: gigabatch objectives NAME. Combine several as a weighted sum:
    objective: {name: sum, terms: [{name: infonce}, {name: siglip}], weights: [1, 0.5]}"""

MODULE_TITLE = "an objective of your own"
MODULE_HINT = (
    "Train one: gigabatch train CONFIG 'objective={module: \"package.mod:Class\", args: {KEY: 1}}'"
)


def objectives(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Objective to explain. Default: list all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    markdown: Annotated[
        bool, typer.Option(help="Print the table of docs/objectives.md instead.")
    ] = False,
) -> None:
    """List the objectives, or explain one.

    An explanation shows formula, papers, config keys, required data and cost.

    \b
    Examples:
      gigabatch objectives
      gigabatch objectives supcon
    """
    from gigabatch.trainer.config.names import suggest_objective
    from gigabatch.trainer.objectives import OBJECTIVES

    if name == "module":
        _write_module(as_json)
        return
    if name is not None and name not in OBJECTIVES:
        raise GigabatchError(f"there is no objective {name!r}. {suggest_objective(name)}")
    if markdown:
        from gigabatch.trainer.objectives.documentation import objectives_table

        write(objectives_table())
        return
    cards = {key: describe(key) for key in ([name] if name else OBJECTIVES)}
    if as_json:
        write(json.dumps(cards[name] if name else cards) + "\n")
    elif name:
        write("\n".join(_explanation(name, cards[name])) + "\n")
    else:
        width = max(map(len, cards))
        lines = [f"{key:{width}}  {card['title']}" for key, card in cards.items()]
        write("\n".join([*lines, "", HINT]) + "\n")


def describe(name: str) -> dict[str, Any]:
    """Return an objective's card, required data, and keys with defaults and help."""
    from dataclasses import asdict

    from gigabatch.trainer.objectives import OBJECTIVES

    keys = _keys(OBJECTIVES[name].Settings)
    return {**asdict(OBJECTIVES[name].card), "needs": _needs(name), "keys": keys}


def _write_module(as_json: bool) -> None:
    """Explain the objective `module`, which has keys but no formula."""
    from gigabatch.trainer.objectives.module import ModuleSettings

    keys = _keys(ModuleSettings)
    if as_json:
        write(json.dumps({"title": MODULE_TITLE, "keys": keys}) + "\n")
    else:
        write("\n".join([f"module: {MODULE_TITLE}", *_key_lines(keys), "", MODULE_HINT]) + "\n")


def _keys(settings: type[ObjectiveSettings]) -> dict[str, Any]:
    """Return default and help of every key."""
    return {
        key: {"default": _default(field), "help": " ".join((field.description or "").split())}
        for key, field in settings.model_fields.items() if key != "name"
    }  # fmt: skip


def _needs(name: str) -> dict[str, Any]:
    """Return the inputs of the objective with default settings, and examples for required keys."""
    from gigabatch.trainer.objectives import OBJECTIVES, build_objective, parse_settings

    fields = OBJECTIVES[name].Settings.model_fields
    required = {key for key, field in fields.items() if field.is_required()} - {"name"}
    example = next(iter(OBJECTIVES[name].examples.values())).settings
    settings = {"name": name, **{key: example[key] for key in required}}
    needs = build_objective(parse_settings(settings), width=WIDTH).needs
    return {
        "taps": list(needs.taps), "columns": [*needs.columns, *needs.numeric_columns],
        "vectors": {name: vector.size for name, vector in needs.vectors.items()},
        "teacher": list(needs.teacher),
        "tables": {table: len(row) for table, row in needs.tables.items()},
    }  # fmt: skip


def _default(field: Any) -> Any:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return field.default_factory()
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _explanation(name: str, card: dict[str, Any]) -> list[str]:
    needs = card["needs"]
    reads = [f"taps {', '.join(needs['taps'])}"]
    reads += [f"a number in json ({column})" for column in needs["columns"]]
    reads += [f"a vector per sample ({vector})" for vector in needs["vectors"]]
    reads += [f"a momentum tower ({', '.join(needs['teacher'])})"] if needs["teacher"] else []
    reads += [
        f"{width} stored numbers per sample ({table})" for table, width in needs["tables"].items()
    ]
    parts = {
        "For": card["use"],
        "Formula": card["formula"],
        "Papers": card["papers"],
        "Needs": "; ".join(reads),
        "Cost": f"{card['passes']} matrix passes of N x N x D per step (InfoNCE: 4)",
    }
    lines = [f"{name}: {card['title']}", ""]
    for label, text in parts.items():
        lines += textwrap.wrap(f"{label}: {text}", WIDTH, subsequent_indent="    ")
    return [*lines, *_key_lines(card["keys"])]


def _key_lines(keys: dict[str, Any]) -> list[str]:
    lines = ["", "Keys, inside `objective:`, with their defaults:"]
    for key, entry in keys.items():
        lines.append(f"  {key}: {json.dumps(entry['default'])}")
        indent = " " * 6
        lines += textwrap.wrap(
            entry["help"], WIDTH, initial_indent=indent, subsequent_indent=indent
        )
    return lines
