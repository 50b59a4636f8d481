"""Objectives: what is minimised, over the embeddings of the whole global batch."""

from __future__ import annotations

from gigabatch.trainer.config import ObjectiveSettings
from gigabatch.trainer.objectives.base import Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.infonce import InfoNCE

__all__ = ["Context", "InfoNCE", "Loss", "Needs", "Objective", "build_objective"]


def build_objective(settings: ObjectiveSettings) -> Objective:
    return {"infonce": InfoNCE}[settings.name](settings)
