"""The outcome of one training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StepResult:
    """The outcome of one training step, the same on every rank.

    Attributes:
        loss: Loss of the global batch.
        applied: False if a loss or gradient was not finite on any rank; then no weight, moment or
            buffer changed on any rank.
        grad_norm: Norm of the towers' gradient before clipping; NaN if not applied.
        metrics: The objective's own metrics.
    """

    loss: float
    applied: bool
    grad_norm: float
    metrics: Mapping[str, float]
