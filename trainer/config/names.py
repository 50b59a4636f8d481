"""Suggestions for names in a config that are misspelled or have a different name in gigabatch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

KIND_ALIASES = {
    "hf": "huggingface",
    "transformers": "huggingface",
    "hugging_face": "huggingface",
    "cnn": "conv",
    "custom": "module",
    "mlp": "vector",
    "sound": "audio",
}
"""Common name -> tower kind. Aliases of objectives are in `Card.aliases`."""


def suggest_kind(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the kind of tower meant by `name`, or lists all kinds."""
    kinds = list(known)
    spelled = name.lower().replace("-", "_")
    names = {alias: kind for alias, kind in KIND_ALIASES.items() if kind in kinds}
    names |= {kind: kind for kind in kinds}
    close = difflib.get_close_matches(spelled, names, 1, 0.6)
    return f"Did you mean {names[close[0]]}?" if close else f"Choose one of {', '.join(kinds)}."


def suggest_objective(name: str) -> str:
    """Return a sentence that names the objective meant by `name`, or lists all objectives."""
    from gigabatch.trainer.objectives import OBJECTIVES
    from gigabatch.trainer.objectives.registry import suggest

    meant = suggest(name)
    if meant is None:
        return f"Choose one of {', '.join(OBJECTIVES)}."
    return f"Did you mean {meant} ({OBJECTIVES[meant].card.title})?"
