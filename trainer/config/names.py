"""Well-known names of objectives and tower kinds, and the names that they have here.

Used to suggest the right name; a config must spell the name itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

OBJECTIVE_ALIASES = {
    "clip": "infonce",
    "open_clip": "infonce",
    "info_nce": "infonce",
    "nt_xent": "infonce",
    "ntxent": "infonce",
    "mnrl": "infonce",
    "multiple_negatives_ranking": "infonce",
    "align": "infonce",
    "lit": "infonce",
    "1-to-k": "infonce",
    "sigmoid": "siglip",
    "simclr": "supcon",
    "unicl": "supcon",
    "fastclip": "sogclr",
    "isogclr": "sogclr",
    "filip": "late_interaction",
    "colbert": "late_interaction",
    "maxsim": "late_interaction",
    "moco": "queue",
    "albef": "queue",
    "memory_bank": "queue",
    "ncr": "noisy",
    "dividemix": "noisy",
    "pc2": "noisy",
    "triplet": "hard_negatives",
    "negclip": "hard_negatives",
    "e5": "hard_negatives",
    "rnc": "label_distance",
    "barlow_twins": "barlow",
    "dino": "swav",
}
"""Well-known name -> objective here. For `triplet`: `hard_negatives` trains on explicit negatives;
`noisy` with head=hinge has the margin loss itself."""
KIND_ALIASES = {
    "hf": "huggingface",
    "transformers": "huggingface",
    "hugging_face": "huggingface",
    "cnn": "conv",
    "custom": "module",
    "mlp": "vector",
    "sound": "audio",
}
"""Well-known name -> kind of tower here."""


def suggest(name: str, known: Iterable[str], aliases: Mapping[str, str]) -> str:
    """Return a sentence that names the entry of `known` meant by `name`, or lists all entries."""
    names = list(known)
    spelled = name.lower().replace("-", "_").replace(" ", "_")
    meant = aliases.get(spelled) or aliases.get(name.lower())
    if meant in names:
        return f"Use {meant} for {name}."
    nearest = difflib.get_close_matches(spelled, names, 1)
    if nearest:
        return f"Did you mean {nearest[0]}?"
    return f"Choose one of {', '.join(names)}."


def suggest_objective(name: str) -> str:
    """Return a sentence that names the objective meant by `name`, or lists all objectives."""
    from gigabatch.trainer.objectives import OBJECTIVES

    return suggest(name, OBJECTIVES, OBJECTIVE_ALIASES)
