"""The sigmoid loss (SigLIP, Zhai et al. 2023): no normaliser, so a pass fewer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gigabatch.kernels import sigmoid_loss
from gigabatch.trainer.config import SigLIPSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.common import clamp_inward, over_widths, paired


class SigLIP(Objective):
    about = About(
        "SigLIP's sigmoid loss, a question for each pair",
        "SigLIP, Zhai et al. 2023",
        "1/N sum_ij log(1 + exp(-y_ij (scale <q_i, k_j> + bias))), y = 1 for pairs, else -1",
        "3",
        "paired data; less work than InfoNCE, and less sensitive to the size of the batch",
    )

    def __init__(self, settings: SigLIPSettings, group: str | None, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.needs = Needs(settings.taps, (settings.positives,) if settings.positives else ())
        self.log_scale_max = math.log(settings.scale_max)
        self.log_scale = nn.Parameter(torch.tensor(math.log(settings.init_logit_scale)))
        self.bias = nn.Parameter(torch.tensor(settings.bias))

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 3

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale = clamp_inward(self.log_scale, ceiling=self.log_scale_max).exp()
        rows = paired(outputs, meta, self.settings.taps, self.settings, self.needs.columns)
        q, k = rows.vectors
        value = sigmoid_loss(
            q, k, scale, self.bias, ids=rows.columns[self.settings.positives or "sample"],
            group=ctx.group, gather_mode=self.settings.gather_mode, backend=self.settings.backend,
        )  # fmt: skip
        return Loss(value, {"logit_scale": scale.detach(), "logit_bias": self.bias.detach()})
