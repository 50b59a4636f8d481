"""Which checkpoints a run keeps: the last few, every M-th step's, and the best by a metric."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.folder import RunFolder


def steps_to_keep(run: RunFolder, saved: Iterable[int], settings: CheckpointSettings) -> set[int]:
    """Of the steps with a sound checkpoint, those that stay."""
    steps = sorted(saved)
    kept = set(steps[-settings.keep :])
    if settings.keep_every:
        kept |= {step for step in steps if step % settings.keep_every == 0}
    if settings.best:
        best = best_step(run, steps, settings.best)
        kept |= set() if best is None else {best}
    return kept


def best_step(run: RunFolder, steps: Iterable[int], metric: str) -> int | None:
    """The step with the highest `metric` of its evaluation, the first of equals; None where none
    of `steps` was evaluated, or to no finite value."""
    values = {step: run.evaluation(step).get(metric, math.nan) for step in sorted(steps)}
    finite = [step for step, value in values.items() if math.isfinite(value)]
    return max(finite, key=values.__getitem__, default=None)


def save_is_due(step: int, settings: CheckpointSettings, evaluated: bool) -> bool:
    """Whether the step itself asks for a checkpoint; `evaluated`: it is measured, too."""
    every = (settings.every_steps, settings.keep_every)
    return any(n and step % n == 0 for n in every) or (evaluated and settings.best is not None)
