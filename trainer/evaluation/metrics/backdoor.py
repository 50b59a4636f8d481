"""Backdoor metrics (BLTO): effects of a trigger in the input on classification.

An attacker who poisons training pairs wants triggered inputs classified as the target class, and
all others as before. Both effects are measured, and also the collapse that reveals an attack:
triggered samples of many classes lie close together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.geometry import isotropy

SUCCESS, CLEAN = "attack_success", "clean_top1"


def attack_values(
    neighbors: Mapping[str, Tensor], classes: Tensor, target: int, triggered: Tensor
) -> dict[str, Tensor]:
    """Split the correctness of predictions into attack success and clean accuracy.

    Args:
        neighbors: Values of a classification in which triggered samples have the target's label.
        classes: True classes, int64 [N].
        target: Class at which the attack aims.
        triggered: Whether a sample has the trigger, bool [N].

    Returns:
        `attack_success` of triggered samples of other classes, and `clean_top1` of samples without
        a trigger; float64 [N], NaN for all other samples.
    """
    top = neighbors["top1"]
    attacked = triggered & (classes != target)
    return {
        SUCCESS: torch.where(attacked, top, torch.nan),
        CLEAN: torch.where(triggered, torch.nan, top),
    }


def summarize_attack(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Average the values that are not NaN; names that have only NaN are left out."""
    valid = {name: column[~column.isnan()] for name, column in values.items()}
    return {name: float(column.mean()) for name, column in valid.items() if len(column)}


def collapse(x: Tensor, triggered: Tensor, world: World) -> dict[str, float]:
    """Compute the mean cosine over pairs of triggered samples, and over pairs of clean ones.

    Args:
        x: This rank's rows [n, D].
        triggered: Whether a sample has the trigger, bool [n].
        world: The ranks; every rank must call this function.

    Returns:
        `triggered_cosine` and `clean_cosine`.
    """
    return {
        "triggered_cosine": 1 - isotropy(x[triggered], world),
        "clean_cosine": 1 - isotropy(x[~triggered], world),
    }
