"""AdamW's parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from gigabatch.trainer.config import OptimizerSettings, ScheduleSettings


def tower_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, object]]:
    """Return AdamW's parameter groups: matrices with weight decay, norms and biases without."""
    trained = [p for _, p in named if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, object]], settings: OptimizerSettings) -> torch.optim.AdamW:
    """Return AdamW over these groups."""
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps
    )


def lr_factor(step: int, steps: int, settings: ScheduleSettings) -> float:
    """Return the learning rate of a step as a fraction of the peak.

    Args:
        step: Number of the step, from 1 to `steps`.
        steps: Total steps of the run.
        settings: Shape of the schedule.
    """
    if step <= settings.warmup_steps:
        return step / settings.warmup_steps
    floor = settings.floor
    match settings.name:
        case "constant":
            return 1.0
        case "cosine":
            done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
            return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
        case "wsd":
            left = (steps - step) / settings.decay_steps
            return floor + (1 - floor) * min(1.0, left)
