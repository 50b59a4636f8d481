"""What a run's objective compares: which modalities, at which output, with which score."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config, singles, taps_of
from gigabatch.trainer.evaluation.taps import HEAD, TOKENS
from gigabatch.trainer.taps import parse_tap


def comparisons(config: Config) -> list[tuple[str, ...]]:
    """Return the groups of modalities that the objective compares.

    A group of two retrieves each other. A larger group comes from an objective that scores all of
    its taps at once; each of its modalities is then retrieved by all others. A run whose objective
    compares no two modalities gets its first two.
    """
    groups: list[tuple[str, ...]] = []
    for objective in singles(config.objective):
        read = {parse_tap(tap).modality for tap in objective.taps}
        modalities = tuple(name for name in config.modalities if name in read)
        at_once = objective.retrieval_score() == "product" and len(read) > 2
        groups += [modalities] if at_once else combinations(modalities, 2)
    return list(dict.fromkeys(groups)) or [tuple(config.modalities[:2])]


def joint_score(config: Config, modalities: Sequence[str]) -> str:
    """Return how the objective scores these modalities together: `product` or `sum`."""
    products = [
        {parse_tap(tap).modality for tap in objective.taps}
        for objective in singles(config.objective)
        if objective.retrieval_score() == "product"
    ]
    return "product" if any(set(modalities) <= read for read in products) else "sum"


def choose_output(config: Config, modalities: Sequence[str], requested: str | None = None) -> str:
    """Choose the tower output for comparing modalities: `head` or `tokens`.

    Without a request it is `tokens` if the objective reads the tokens of all modalities but not
    the vectors of all, because untrained vectors retrieve next to nothing.

    Raises:
        GigabatchError: if tokens are requested that the objective does not read.
    """
    read = {(tap.modality, tap.output) for tap in map(parse_tap, taps_of(config.objective))}
    pooled, tokens = ({m for m in modalities if (m, place) in read} for place in (HEAD, TOKENS))
    if requested == TOKENS and (missing := [m for m in modalities if m not in tokens]):
        raise GigabatchError(
            f"tap=tokens: the run has no tokens of {', '.join(missing)}: its objective reads "
            f"{', '.join(taps_of(config.objective))}. Remove tap=tokens, or compare modalities "
            "whose tokens it reads."
        )
    trained_on_tokens = len(tokens) == len(modalities) > len(pooled)
    return requested or (TOKENS if trained_on_tokens else HEAD)
