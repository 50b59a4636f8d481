"""Inputs of reference formulas, and settings under which objectives are tested and timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gigabatch.trainer.taps import parse_tap


@dataclass(frozen=True)
class Example:
    """Settings under which tests compare an objective with its reference formula.

    Attributes:
        settings: Keys of the objective, without `name`.
        missing: Whether some samples lack a modality.
        captions: Texts per sample.
        steps: Number of steps to run; state carries over between them.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    missing: bool = False
    captions: int = 1
    steps: int = 3


@dataclass(frozen=True)
class Benchmark:
    """Settings under which `gigabatch bench objectives` times an objective.

    Attributes:
        settings: Keys of the objective, without `name`.
        share: Number of samples relative to InfoNCE's, chosen so that both have equally many rows.
        captions: Texts per sample.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    captions: int = 1


@dataclass
class ReferenceBatch:
    """The complete global batch of one step, for a reference formula.

    Attributes:
        outputs: Tap -> float64 [N, D] or [N, T, D], of unit length; `teacher.TAP` likewise.
        parameters: The objective's parameters by name, float64.
        meta: As in `Objective.forward`, without tables.
        memory: State that the formula keeps between steps, and may change.
        step: Number of the step, from 1. The epoch is `step - 1`.
        seed: Seed of the run.
    """

    outputs: dict[str, Tensor]
    parameters: dict[str, Tensor]
    meta: dict[str, Tensor]
    memory: dict[Any, Any]
    step: int
    seed: int = 5

    @property
    def scale(self) -> Tensor:
        """The logit scale, 0-dimensional."""
        return self.parameters["log_scale"].exp()

    def complete(self, *taps: str) -> Tensor:
        """Return bool [N]: which samples have the modality of every tap."""
        present = torch.ones_like(self.meta["sample"], dtype=torch.bool)
        for tap in taps:
            present = present & self.meta.get(f"{parse_tap(tap).modality}_present", present)
        return present


def negative_log_softmax(logits: Tensor, positive: Tensor) -> Tensor:
    """Return [n]: the mean of -log softmax over each row's positives, `positive` bool [n, m]."""
    log_probability = torch.where(positive, logits.log_softmax(1), 0)
    return -log_probability.sum(1) / positive.sum(1)


Value = tuple[Tensor, Tensor | None]
"""The value of a loss, and a surrogate that has the loss's gradient; None if the value has it."""
