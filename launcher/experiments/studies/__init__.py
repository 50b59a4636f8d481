"""The experiments, one file per study. `STUDIES` are those on synthetic data."""

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


def real_data_studies(source: Path | None) -> tuple[Study, ...]:
    """Build the studies on real drawings.

    Args:
        source: Folder of the drawings; None builds studies that can be listed but not run.

    Raises:
        GigabatchError: if a set is missing in the folder.
    """
    fingerprint = emoji.fingerprint(source) if source else ""
    modules = (emoji_noisy, emoji_languages)
    return tuple(m.study((source or Path()).absolute(), fingerprint) for m in modules)
