"""InfoNCE between images and captions (van den Oord et al. 2018; CLIP, Radford et al. 2021), with
several positives a row where samples share an id (SupCon's average, Khosla et al. 2020, eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gigabatch.kernels import contrastive_loss
from gigabatch.trainer.config import ObjectiveSettings
from gigabatch.trainer.objectives.base import Context, Loss, Needs, Objective


class InfoNCE(Objective):
    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__()
        self.positives, self.settings = settings.positives, settings
        self.needs = Needs(("image", "text"), (self.positives,) if self.positives else ())
        self.log_scale_max = math.log(settings.scale_max)
        self.log_scale = nn.Parameter(
            torch.tensor(math.log(settings.scale)), requires_grad=settings.learn_scale
        )

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale = clamp_inward(self.log_scale, self.log_scale_max).exp()
        # By sample number, a sample that an epoch's edge brings twice is its own positive.
        ids = meta[self.positives or "sample"]
        kind = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
        value = contrastive_loss(
            outputs["image"].to(kind), outputs["text"].to(kind), scale, ids_q=ids, group=ctx.group,
            same_id=self.settings.same_id, label_smoothing=self.settings.label_smoothing,
            schedule=self.settings.schedule, backend=self.settings.backend,
            cache_bytes=2**20 * self.settings.cache_mib,
        )  # fmt: skip
        return Loss(value, {"logit_scale": scale.detach()})


def clamp_inward(x: Tensor, ceiling: float) -> Tensor:
    """min(x, ceiling), whose gradient passes unless it would push x further out.

    A plain clamp has no gradient above its limit, so the parameter could never come back; a clamp
    of the parameter itself would be overwritten by an optimizer that keeps its own copy.
    """
    return _ClampInward.apply(x, ceiling)


class _ClampInward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, ceiling: float) -> Tensor:
        ctx.outside = bool(x >= ceiling)  # type: ignore[attr-defined]
        return x.clamp(max=ceiling)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        # Descent moves x by -grad: a negative gradient pushes up, out of the range.
        return (grad.clamp(min=0) if ctx.outside else grad), None  # type: ignore[attr-defined]
