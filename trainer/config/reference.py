"""The reference page of all config keys, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from gigabatch.trainer.config import Config
from gigabatch.trainer.config.explain import KeyHelp, explain_keys
from gigabatch.trainer.config.keys import DEFAULT_TAGS

Row = tuple[str, str, str, str]
"""Key, meaning, type, default."""


def config_reference() -> str:
    """Return the meaning, type and default of every config key, as Markdown.

    Each top-level section is a heading of level 2. Where a section has kinds, keys that several
    kinds share are listed once, then every kind has a heading of level 3.
    """
    entries = explain_keys(None)
    lines: list[str] = []
    for name, info in Config.model_fields.items():
        lines += [f"## {name}", ""]
        if info.description:
            lines += [" ".join(info.description.split()), ""]
        lines += _tables([entry for entry in entries if entry.key.partition(".")[0] == name])
    return "\n".join(lines)


def _tables(entries: Sequence[KeyHelp]) -> list[str]:
    """Return the tables of a section: keys of all kinds, of several kinds, then of each kind."""
    kinds_of: dict[Row, list[str]] = {}
    for entry in entries:
        kinds = kinds_of.setdefault(_row(entry), [])
        kinds += [entry.choice] if entry.choice else []
    lines = _table([row for row, kinds in kinds_of.items() if not kinds])
    choices = list(dict.fromkeys(entry.choice for entry in entries if entry.choice))
    for selector in dict.fromkeys(choice.partition("=")[0] for choice in choices):
        here = [choice for choice in choices if choice.partition("=")[0] == selector]
        shared = {row: k for row, k in kinds_of.items() if len(k) > 1 and k[0] in here}
        if shared:
            lines += [f"### `{selector}`", "", "Keys of several kinds:", ""]
            lines += _table_with_kinds(shared)
        for choice in here:
            lines += _kind(choice, [row for row, kinds in kinds_of.items() if kinds == [choice]])
    return lines


def _kind(choice: str, rows: Sequence[Row]) -> list[str]:
    """Return the heading, the description and the table of one kind."""
    selector, _, tag = choice.partition("=")
    lines = [f"### `{choice}`", ""]
    is_default = tag == DEFAULT_TAGS[selector.rpartition(".")[2]]
    for key, meaning, *_ in rows:
        if key == selector:
            lines += [meaning + " This is the default." * is_default, ""]
    rest = [row for row in rows if row[0] != selector]
    return [*lines, *_table(rest)]


def _row(entry: KeyHelp) -> Row:
    return entry.key, entry.meaning, entry.type, entry.default


def _table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["| Key | Meaning | Type | Default |", "|---|---|---|---|"]
    return [*lines, *(_line([f"`{k}`", m, t, f"`{d}`"]) for k, m, t, d in rows), ""]


def _table_with_kinds(rows: dict[Row, list[str]]) -> list[str]:
    lines = ["| Key | Meaning | For | Type | Default |", "|---|---|---|---|---|"]
    for (key, meaning, kind, default), choices in rows.items():
        names = ", ".join(choice.partition("=")[2] for choice in choices)
        lines.append(_line([f"`{key}`", meaning, names, kind, f"`{default}`"]))
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    """Escape Markdown: `|` everywhere, other special characters outside of code."""
    parts = text.replace("|", "\\|").split("`")
    parts[::2] = [part.replace("*", r"\*").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)
