"""Comparisons that a run's objective makes: their modalities, tower output and score."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config, singles, taps_of
from gigabatch.trainer.evaluation.taps import HEAD, TOKENS
from gigabatch.trainer.taps import parse_tap


def comparisons(config: Config) -> list[tuple[str, ...]]:
    """Return the groups of modalities that the objective compares.

    The modalities of a group of two retrieve each other. A larger group is from an objective that
    scores all its taps at once; each of its modalities is then retrieved by all others. If the
    objective compares no modalities with each other, the run's first two are returned.
    """
    groups: list[tuple[str, ...]] = []
    for objective in singles(config.objective):
        read = {parse_tap(tap).modality for tap in objective.taps}
        modalities = tuple(name for name in config.modalities if name in read)
        at_once = objective.retrieval_score() == "product" and len(read) > 2
        groups += [modalities] if at_once else combinations(modalities, 2)
    return list(dict.fromkeys(groups)) or [tuple(config.modalities[:2])]


def joint_score(config: Config, modalities: Sequence[str]) -> str:
    """Return the score with which the objective compares these modalities: `product` or `sum`."""
    products = [
        {parse_tap(tap).modality for tap in objective.taps}
        for objective in singles(config.objective)
        if objective.retrieval_score() == "product"
    ]
    return "product" if any(set(modalities) <= read for read in products) else "sum"


def choose_output(config: Config, modalities: Sequence[str], requested: str | None = None) -> str:
    """Choose the tower output for comparing modalities: `head` or `tokens`.

    Without a request, it is `tokens` if the objective reads the tokens of all modalities, but not
    the vectors of all, because vectors that were not trained retrieve almost nothing.

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
