"""Retention of checkpoints: the newest, every M-th step, and the best by a metric."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.folder import RunFolder


def steps_to_keep(run: RunFolder, saved: Iterable[int], settings: CheckpointSettings) -> set[int]:
    """Select the steps whose checkpoints `settings` keeps.

    Args:
        run: The run, whose evaluations determine the best checkpoint.
        saved: Steps with a valid checkpoint.
        settings: Which checkpoints to keep.
    """
    steps = sorted(saved)
    kept = set(steps[-settings.keep :])
    if settings.keep_every:
        kept |= {step for step in steps if step % settings.keep_every == 0}
    if settings.best:
        best = best_step(run, steps, settings.best)
        kept |= set() if best is None else {best}
    return kept


def best_step(run: RunFolder, steps: Iterable[int], metric: str) -> int | None:
    """Return the earliest step whose evaluation has the highest value of `metric`.

    Returns None if no step of `steps` has a finite value.
    """
    values = {step: run.evaluation(step).get(metric, math.nan) for step in sorted(steps)}
    finite = [step for step, value in values.items() if math.isfinite(value)]
    return max(finite, key=values.__getitem__, default=None)


def save_is_due(step: int, settings: CheckpointSettings, evaluated: bool) -> bool:
    """Return whether a step's number makes a checkpoint due.

    Args:
        step: Steps trained so far.
        settings: When to save.
        evaluated: Whether this step is evaluated; with `best`, evaluated steps are saved.
    """
    intervals = (settings.every_steps, settings.keep_every)
    return any(n and step % n == 0 for n in intervals) or (evaluated and settings.best is not None)
