"""The experiments, a file each; `STUDIES` holds them in the order of their papers."""

from __future__ import annotations

from gigabatch.launcher.reproduce.studies import (
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

_MODULES = (
    noisy, temperature, queue, small_batches, head, late_interaction, modality_gap, symile, order,
    groups, label_distance, multilingual, languages,
)  # fmt: skip
STUDIES = tuple(module.STUDY for module in _MODULES)
