"""`gigabatch objectives`: what can be minimised, told from the code."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated, Any

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.output import write

WIDTH = 96
SUM = """Explain one: gigabatch objectives NAME. Several at once, weighted:
    objective: {name: sum, terms: [{name: infonce}, {name: siglip}], weights: [1, 0.5]}"""


def objectives(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One of them, explained.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the objectives, or explain one: formula, papers, keys, needs and cost."""
    from gigabatch.trainer.objectives import OBJECTIVES

    if name is not None and name not in OBJECTIVES:
        raise GigabatchError(f"there is no objective {name!r}; there are {', '.join(OBJECTIVES)}.")
    told = {each: describe(each) for each in ([name] if name else OBJECTIVES)}
    if as_json:
        write(json.dumps(told[name] if name else told) + "\n")
    elif name:
        write("\n".join(_explained(name, told[name])) + "\n")
    else:
        width = max(map(len, told))
        lines = [f"{each:{width}}  {about['title']}" for each, about in told.items()]
        write("\n".join([*lines, "", SUM]) + "\n")


def describe(name: str) -> dict[str, Any]:
    """What the code says of an objective; its keys with their defaults and help."""
    from dataclasses import asdict

    from gigabatch.trainer.objectives import OBJECTIVES

    kind = OBJECTIVES[name].Settings
    keys = {
        key: {"default": _default(field), "help": " ".join((field.description or "").split())}
        for key, field in kind.model_fields.items() if key != "name"
    }  # fmt: skip
    return {**asdict(OBJECTIVES[name].card), "needs": _needs(name), "keys": keys}


def _needs(name: str) -> dict[str, Any]:
    """By its default settings; examples stand for what has no default."""
    from gigabatch.trainer.objectives import OBJECTIVES, build_objective, parse_settings

    fields = OBJECTIVES[name].Settings.model_fields
    required = {key for key, field in fields.items() if field.is_required()} - {"name"}
    example = next(iter(OBJECTIVES[name].examples.values())).settings
    settings = {"name": name, **{key: example[key] for key in required}}
    needs = build_objective(parse_settings(settings), width=WIDTH).needs
    return {
        "taps": list(needs.taps), "columns": [*needs.columns, *needs.numeric_columns],
        "vectors": {name: each.size for name, each in needs.vectors.items()},
        "teacher": list(needs.teacher),
        "tables": {table: len(row) for table, row in needs.tables.items()},
    }  # fmt: skip


def _default(field: Any) -> Any:
    if field.is_required():
        return "required"
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _explained(name: str, about: dict[str, Any]) -> list[str]:
    needs = about["needs"]
    asked = [f"taps {', '.join(needs['taps'])}"]
    asked += [f"a number in json ({column})" for column in needs["columns"]]
    asked += [f"vectors of the samples ({name})" for name in needs["vectors"]]
    asked += [f"a momentum tower ({', '.join(needs['teacher'])})"] if needs["teacher"] else []
    asked += [f"{width} numbers a sample ({n})" for n, width in needs["tables"].items()]
    parts = {
        "For": about["use"],
        "Formula": about["formula"],
        "Papers": about["papers"],
        "Needs": "; ".join(asked),
        "Cost": f"{about['passes']} matrix passes of N x N x D a step (InfoNCE: 4)",
    }
    lines = [f"{name}: {about['title']}", ""]
    for label, text in parts.items():
        lines += textwrap.wrap(f"{label}: {text}", WIDTH, subsequent_indent="    ")
    lines += ["", "Keys, inside `objective:`, with their defaults:"]
    for key, told in about["keys"].items():
        lines.append(f"  {key}: {json.dumps(told['default'])}")
        lines += textwrap.wrap(
            told["help"], WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return lines
