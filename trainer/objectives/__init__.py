"""Objectives: what is minimised, over the embeddings of the whole global batch."""

from __future__ import annotations

from typing import Any, get_args

import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.kernels.stats import load_backend
from gigabatch.trainer.config import Single, SumSettings
from gigabatch.trainer.objectives.barlow import Barlow
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.byol import BYOL
from gigabatch.trainer.objectives.hard_negatives import HardNegatives
from gigabatch.trainer.objectives.infonce import InfoNCE
from gigabatch.trainer.objectives.label_distance import LabelDistance
from gigabatch.trainer.objectives.late_interaction import LateInteraction
from gigabatch.trainer.objectives.noisy import Noisy
from gigabatch.trainer.objectives.queue import Queue
from gigabatch.trainer.objectives.siglip import SigLIP
from gigabatch.trainer.objectives.sogclr import SogCLR
from gigabatch.trainer.objectives.sum import Sum
from gigabatch.trainer.objectives.supcon import SupCon
from gigabatch.trainer.objectives.swav import SwAV
from gigabatch.trainer.objectives.symile import Symile

__all__ = [
    "OBJECTIVES",
    "About",
    "Context",
    "Loss",
    "Needs",
    "Objective",
    "build_objective",
    "settings_class",
]

OBJECTIVES: dict[str, Any] = {
    "infonce": InfoNCE,
    "siglip": SigLIP,
    "supcon": SupCon,
    "sogclr": SogCLR,
    "late_interaction": LateInteraction,
    "queue": Queue,
    "noisy": Noisy,
    "symile": Symile,
    "hard_negatives": HardNegatives,
    "label_distance": LabelDistance,
    "barlow": Barlow,
    "byol": BYOL,
    "swav": SwAV,
}
"""By name, as they are shown in order. Called with their settings, `group` and `width`."""


def settings_class(name: str) -> type[Single]:
    """The description that an objective of that name has in a config."""
    kinds: tuple[type[Single], ...] = get_args(Single)
    return next(kind for kind in kinds if name in get_args(kind.model_fields["name"].annotation))


def build_objective(
    settings: Single | SumSettings,
    device: torch.device | str = "cpu",
    group: str | None = None,
    width: int = 0,
) -> Objective:
    """The objective, on a device. `group`: the column whose values are compared each with itself
    alone. `width`: of the shared space. Raises GigabatchError where the device cannot run its back
    end."""
    if isinstance(settings, SumSettings):
        terms = [build_objective(term, device, group, width) for term in settings.terms]
        names = [term.name for term in settings.terms]
        return Sum(terms, names, settings.weights or [1.0] * len(terms))
    try:
        load_backend(getattr(settings, "backend", None), torch.empty(0, device=device))
    except ValueError as error:
        raise GigabatchError(f"objective.backend: {error}") from None
    return OBJECTIVES[settings.name](settings, group, width).to(device)
