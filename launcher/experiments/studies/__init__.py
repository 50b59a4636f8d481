"""The experiments, a file each; `STUDIES` holds those on made-up data, in the order of their
papers."""

from __future__ import annotations

from pathlib import Path

from gigabatch.launcher.experiments.studies import (
    emoji,
    emoji_languages,
    emoji_noisy,
    groups,
    head,
    label_distance,
    languages,
    late_interaction,
    modality_gap,
    multilingual,
    noisy,
    order,
    queue,
    small_batches,
    symile,
    temperature,
)
from gigabatch.launcher.experiments.study import Study

_MODULES = (
    noisy, temperature, queue, small_batches, head, late_interaction, modality_gap, symile, order,
    groups, label_distance, multilingual, languages,
)  # fmt: skip
STUDIES = tuple(module.STUDY for module in _MODULES)


def studies_on(source: Path | None) -> tuple[Study, ...]:
    """The experiments on the drawings in a folder; without one they are descriptions, to be told
    and not to be run. Raises GigabatchError for a folder that lacks a set."""
    of = emoji.fingerprint(source) if source else ""
    modules = (emoji_noisy, emoji_languages)
    return tuple(each.study((source or Path()).absolute(), of) for each in modules)
