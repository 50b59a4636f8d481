"""BYOL (Grill et al. 2020), as an addition to CLIP (number 40): a predictor finds in one view what
a momentum tower sees in another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.trainer.config import BYOLSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.common import paired, weighted_mean
from gigabatch.trainer.taps import TEACHER, parse_tap


class BYOL(Objective):
    about = About(
        "BYOL: predict what a momentum tower sees in another view; no negatives",
        "BYOL, Grill et al. 2020; as an addition to CLIP, 40",
        "mean_i [2 - 2 cos(p(a_i), teacher_b_i)], both ways, halved; the teacher without gradient",
        "12 hidden / N, and one more forward pass of the towers",
        "an addition, in a sum",
    )

    def __init__(self, settings: BYOLSettings, group: str | None, width: int) -> None:
        super().__init__()
        self.settings = settings
        # The teacher augments anew: its view is never that of the tap it is compared with.
        self.seen = [parse_tap(tap).base for tap in settings.taps]
        teacher = tuple(dict.fromkeys(self.seen))
        self.needs = Needs(settings.taps, teacher=teacher, momentum=settings.momentum)
        # No batch norm: its statistics would differ from rank to rank. The vectors are normalised.
        self.predictor = nn.Sequential(
            nn.Linear(width, settings.hidden), nn.LayerNorm(settings.hidden), nn.ReLU(),
            nn.Linear(settings.hidden, width),
        )  # fmt: skip

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 12 * self.settings.hidden / len(outputs[self.settings.taps[0]])

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        taps = (*self.settings.taps, *(TEACHER + tap for tap in self.seen))
        a, b, of_a, of_b = paired(outputs, meta, taps).vectors
        ways = [
            2 - 2 * F.cosine_similarity(self.predictor(mine), seen, dim=1)
            for mine, seen in ((a, of_b), (b, of_a))
        ]
        each = torch.stack(ways).mean(0)
        return Loss(weighted_mean(each, torch.ones_like(each), ctx))
