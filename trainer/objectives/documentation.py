"""The table of all objectives in docs/objectives.md, generated from their cards."""

from __future__ import annotations

import re

from gigabatch.trainer.objectives.registry import OBJECTIVES

MARKER = "<!-- Table of `gigabatch objectives --markdown`"
COMMITTED = re.compile(rf"({re.escape(MARKER)}[^\n]*\n\n)((?:\|[^\n]*(?:\n|$))+)")
"""The comment that marks the committed table, and the table."""


def objectives_table() -> str:
    """Return a Markdown table: name, title, sources and cost of each objective."""
    lines = ["| name | objective | sources | matrix passes |", "| --- | --- | --- | --- |"]
    for name, kind in OBJECTIVES.items():
        cells = (f"`{name}`", kind.card.title, kind.card.papers, kind.card.passes)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def committed_rows(page: str) -> list[str]:
    """Return the rows of the committed table in docs/objectives.md, without its two header lines.

    Raises:
        ValueError: If the page has no such table.
    """
    return _committed(page)[2].splitlines()[2:]


def with_generated_table(page: str) -> str:
    """Replace the committed table of docs/objectives.md by that of all registered objectives.

    Raises:
        ValueError: If the page has no such table.
    """
    match = _committed(page)
    return f"{page[: match.start()]}{match[1]}{objectives_table()}{page[match.end() :]}"


def _committed(page: str) -> re.Match[str]:
    match = COMMITTED.search(page)
    if match is None:
        raise ValueError(f"no table after a comment that begins {MARKER!r}")
    return match
