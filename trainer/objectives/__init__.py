"""Objectives: what is minimised, over the embeddings of the whole global batch."""

from __future__ import annotations

import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.kernels.stats import engine_of
from gigabatch.trainer.config import ObjectiveSettings
from gigabatch.trainer.objectives.base import Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.infonce import InfoNCE

__all__ = ["Context", "InfoNCE", "Loss", "Needs", "Objective", "build_objective"]


def build_objective(
    settings: ObjectiveSettings, device: torch.device | str = "cpu", group: str | None = None
) -> Objective:
    """The objective, on a device. `group`: the column whose values are compared each with itself
    alone. Raises GigabatchError where the device cannot run its back end."""
    try:
        engine_of(settings.backend, torch.empty(0, device=device))
    except ValueError as error:
        raise GigabatchError(f"objective.backend: {error}") from None
    return {"infonce": InfoNCE}[settings.name](settings, group).to(device)
