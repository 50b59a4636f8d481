"""Contrast by continuous labels (SupReMix, Wu et al. 2024, number 42): the weights, which carry its
gain; not its mixtures."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gigabatch.kernels import AbsDiff
from gigabatch.trainer.config import LabelDistanceSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs
from gigabatch.trainer.objectives.blocks import Scaled, present
from gigabatch.trainer.objectives.supcon import among


class LabelDistance(Scaled):
    about = About(
        "SupCon for continuous labels: the farther a label, the stronger a negative",
        "SupReMix, 42 (its weights, without mixtures)",
        "mean_i [log sum_{j != i} (1 + distance |y_i - y_j|) exp(l_ij) - mean_{p != i, y_p = y_i} "
        "l_ip]",
        "4 T^2 for T taps",
        "regression: ages, depths, doses, prices",
    )

    def __init__(self, settings: LabelDistanceSettings, group: str | None, width: int) -> None:
        super().__init__(settings)
        self.settings = settings
        self.needs = Needs(settings.taps, numbers=(settings.label,))

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 4 * len(self.settings.taps) ** 2

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        found = [
            present(outputs, meta, tap, settings, {"label": settings.label})
            for tap in settings.taps
        ]
        z, y = torch.cat([rows for rows, _ in found]), torch.cat([c["label"] for _, c in found])
        rule = (AbsDiff(y, "id", torch.full_like(y, settings.distance)),)
        value = among(z, y, rule, scale, settings, ctx)
        return Loss(value, {"logit_scale": scale.detach()})
