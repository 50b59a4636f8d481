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
    """`group`: the column whose values are compared each with itself alone (`data.group`)."""

    def __init__(self, settings: ObjectiveSettings, group: str | None = None) -> None:
        super().__init__()
        self.positives, self.group, self.settings = settings.positives, group, settings
        columns = dict.fromkeys(name for name in (self.positives, group) if name)
        self.needs = Needs(("image", "text"), tuple(columns))
        self.log_scale_max = math.log(settings.scale_max)
        self.log_scale = nn.Parameter(
            torch.tensor(math.log(settings.scale)), requires_grad=settings.learn_scale
        )

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale = clamp_inward(self.log_scale, self.log_scale_max).exp()
        kind = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
        # By sample number, a sample that an epoch's edge brings twice is its own positive.
        names = {"ids": self.positives or "sample"} | ({"groups": self.group} if self.group else {})
        q, of_q = _present(outputs["image"].to(kind), meta, names, "image")
        k, of_k = _present(outputs["text"].to(kind), meta, names, "text")
        value = contrastive_loss(
            q, k, scale, ids_q=of_q["ids"], ids_k=of_k["ids"], groups_q=of_q.get("groups"),
            groups_k=of_k.get("groups"), group=ctx.group,
            same_id=self.settings.same_id, label_smoothing=self.settings.label_smoothing,
            schedule=self.settings.schedule, backend=self.settings.backend,
            cache_bytes=2**20 * self.settings.cache_mib,
        )  # fmt: skip
        return Loss(value, {"logit_scale": scale.detach()})


def _present(
    rows: Tensor, meta: Mapping[str, Tensor], names: Mapping[str, str], modality: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows that are there, and their columns as `contrastive_loss` names them. Captions come
    K a sample; a modality that a sample lacks has no row."""
    columns = {name: meta[column] for name, column in names.items()}
    per = len(rows) // max(1, len(columns["ids"]))
    if per > 1:
        columns = {name: column.repeat_interleave(per) for name, column in columns.items()}
    here = meta.get(f"{modality}_present")
    if here is None:
        return rows, columns
    return rows[here], {name: column[here] for name, column in columns.items()}


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
