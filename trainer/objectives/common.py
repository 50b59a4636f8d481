"""What objectives share: the rows that count, learnt scales, sums over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.kernels import gather_rows
from gigabatch.kernels.sources import all_sum
from gigabatch.trainer.config import ObjectiveSettings, ScaledSettings
from gigabatch.trainer.objectives.base import Context, Loss, Objective
from gigabatch.trainer.taps import parse_tap


class Scaled(Objective):
    """An objective of logits, with a scale that may be learnt."""

    def __init__(self, settings: ScaledSettings) -> None:
        super().__init__()
        self.log_scale_max = math.log(settings.scale_max)
        self.log_scale = nn.Parameter(
            torch.tensor(math.log(settings.init_logit_scale)), requires_grad=settings.learn_scale
        )

    def scale(self) -> Tensor:
        return clamp_inward(self.log_scale, ceiling=self.log_scale_max).exp()


Forward = Callable[[Any, Mapping[str, Tensor], Mapping[str, Tensor], Context], Loss]


def over_widths(forward: Forward) -> Forward:
    """Matryoshka representations (Kusupati et al. 2022), for the forward pass of an objective whose
    settings have `widths`: the mean over widths d of its loss of the vectors' first d coordinates,
    of unit length again."""

    @wraps(forward)
    def nested(
        self: Any, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        if not self.settings.widths:
            return forward(self, outputs, meta, ctx)
        losses = []
        for d in self.settings.widths:
            short = {tap: first_coordinates(rows, d) for tap, rows in outputs.items()}
            losses.append(forward(self, short, meta, ctx))
        return replace(losses[-1], value=torch.stack([each.value for each in losses]).mean())

    return nested


def first_coordinates(rows: Tensor, width: int) -> Tensor:
    """The first `width` coordinates of unit vectors [..., D], of unit length again."""
    return rows if width == rows.shape[-1] else F.normalize(rows[..., :width], dim=-1)


@dataclass(frozen=True)
class Paired:
    """The samples of this rank that have every tap. `here`: bool [n], which they are; `vectors`:
    of each tap; `columns`: of the samples, as `meta` has them."""

    here: Tensor
    vectors: tuple[Tensor, ...]
    columns: dict[str, Tensor]


def paired(
    outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], taps: Sequence[str],
    settings: ObjectiveSettings | None = None, columns: Sequence[str] = (),
) -> Paired:  # fmt: skip
    """For objectives whose row i of one tap belongs to row i of another."""
    here = torch.ones_like(meta["sample"], dtype=torch.bool)
    for name in {f"{parse_tap(tap).modality}_present" for tap in taps} & meta.keys():
        here = here & meta[name]
    all_here = bool(here.all())  # then nothing is copied, and no gradient put back in its place
    found = {n: meta[n] if all_here else meta[n][here] for n in ("sample", *columns)}
    rows = (outputs[tap] if all_here else outputs[tap][here] for tap in taps)
    return Paired(here, tuple(rounded(each, settings) for each in rows), found)


def present(
    outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], tap: str,
    settings: ObjectiveSettings, columns: Mapping[str, str],
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The rows of a tap that are there, and their columns, by new names; as `nth`, which of its
    sample's captions a row is. Captions come K a sample; a modality that a sample lacks has no
    row."""
    rows, found = rounded(outputs[tap], settings), {n: meta[c] for n, c in columns.items()}
    per = len(rows) // max(1, len(next(iter(found.values()))))
    if per > 1:
        found = {name: column.repeat_interleave(per, dim=0) for name, column in found.items()}
    found["nth"] = torch.arange(len(rows), device=rows.device) % max(1, per)
    here = meta.get(f"{parse_tap(tap).modality}_present")
    if here is None:
        return rows, found
    return rows[here], {name: column[here] for name, column in found.items()}


def rounded(rows: Tensor, settings: ObjectiveSettings | None) -> Tensor:
    """As precise as the settings want the products; without settings float32."""
    if settings is None:
        return rows
    return rows.to(torch.bfloat16 if settings.precision == "bf16" else torch.float32)


def weighted_mean(values: Tensor, weights: Tensor, ctx: Context) -> Tensor:
    """World size x (this rank's part of the weighted mean over all ranks' rows)."""
    total = all_sum(weights.detach().sum(), ctx.group)
    return ctx.world_size * (weights * values).sum() / total.clamp(min=1e-12)


def mean_metric(values: Tensor, ctx: Context) -> Tensor:
    """The mean over all ranks' rows, the same on every rank, without gradient."""
    sums = torch.stack([values.detach().sum(), values.new_tensor(float(len(values)))])
    total, count = all_sum(sums, ctx.group)
    return total / count.clamp(min=1)


def count_same(ids: Tensor, ctx: Context) -> tuple[Tensor, int]:
    """float [n]: how many of all ranks' rows have each row's id, itself among them; and how many
    rows there are."""
    everyone, _ = torch.sort(gather_rows(ids, ctx.group))
    low, high = (torch.searchsorted(everyone, ids, right=right) for right in (False, True))
    return (high - low).float(), len(everyone)


def clamp_inward(x: Tensor, floor: float = -math.inf, ceiling: float = math.inf) -> Tensor:
    """x between two bounds, whose gradient passes unless it would push x further out.

    A plain clamp has no gradient beyond its limit, so the parameter could never come back; a clamp
    of the parameter itself would be overwritten by an optimizer that keeps its own copy.
    """
    return _ClampInward.apply(x, floor, ceiling)


class _ClampInward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, floor: float, ceiling: float
    ) -> Tensor:
        ctx.above, ctx.below = bool(x >= ceiling), bool(x <= floor)  # type: ignore[attr-defined]
        return x.clamp(floor, ceiling)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        # Descent moves x by -grad: a negative gradient pushes up, a positive one down.
        low = 0.0 if ctx.above else None  # type: ignore[attr-defined]
        high = 0.0 if ctx.below else None  # type: ignore[attr-defined]
        return (grad if low is high is None else grad.clamp(low, high)), None, None
