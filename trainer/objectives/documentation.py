"""The table of all objectives in docs/objectives.md, generated from their cards."""

from __future__ import annotations

from gigabatch.trainer.objectives.registry import OBJECTIVES


def objectives_table() -> str:
    """Return a Markdown table: name, title, sources and cost of each objective."""
    lines = ["| name | objective | sources | matrix passes |", "| --- | --- | --- | --- |"]
    for name, kind in OBJECTIVES.items():
        cells = (f"`{name}`", kind.card.title, kind.card.papers, kind.card.passes)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"
