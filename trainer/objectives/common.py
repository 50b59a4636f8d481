"""Shared parts of objectives: valid rows, logit scales, means over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.kernels import gather_rows
from gigabatch.kernels.sources import all_sum
from gigabatch.trainer.objectives.base import Context, Loss, Objective
from gigabatch.trainer.objectives.settings import EngineSettings, ScaledSettings
from gigabatch.trainer.taps import parse_tap

S = TypeVar("S", bound=ScaledSettings)


class Scaled(Objective[S]):
    """An objective with a logit scale, which may be trained."""

    def __init__(self, settings: S) -> None:
        super().__init__(settings)
        self.log_scale_max = math.log(settings.scale_max)
        self.log_scale = nn.Parameter(
            torch.tensor(math.log(settings.init_logit_scale)), requires_grad=settings.learn_scale
        )

    def scale(self) -> Tensor:
        """Return the logit scale, 0-dimensional."""
        return clamp_inward(self.log_scale, ceiling=self.log_scale_max).exp()

    def mean_temperature(self, tables: Mapping[str, Tensor]) -> float | None:
        return float(1 / self.scale().detach())


Forward = Callable[[Any, Mapping[str, Tensor], Mapping[str, Tensor], Context], Loss]


def over_widths(forward: Forward) -> Forward:
    """Add Matryoshka representations (Kusupati et al. 2022) to a forward pass; a decorator.

    If the settings have `widths`, the loss is the mean over them: for each width d, `forward` gets
    the vectors' first d coordinates, normalized again.
    """

    @wraps(forward)
    def nested_forward(
        self: Any, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        if not self.settings.widths:
            return forward(self, outputs, meta, ctx)
        losses = []
        for width in self.settings.widths:
            truncated = {tap: first_coordinates(rows, width) for tap, rows in outputs.items()}
            losses.append(forward(self, truncated, meta, ctx))
        return replace(losses[-1], value=torch.stack([loss.value for loss in losses]).mean())

    return nested_forward


def first_coordinates(rows: Tensor, width: int) -> Tensor:
    """Truncate unit vectors [..., D] to `width` coordinates and normalize them again."""
    return rows if width == rows.shape[-1] else F.normalize(rows[..., :width], dim=-1)


@dataclass(frozen=True)
class ValidPairs:
    """This rank's samples that have every tap.

    Attributes:
        valid: bool [n], true for the selected samples.
        vectors: Rows of the selected samples, one tensor per tap.
        columns: Columns of the selected samples, named as in `meta`.
    """

    valid: Tensor
    vectors: tuple[Tensor, ...]
    columns: dict[str, Tensor]


def valid_pairs(
    outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], taps: Sequence[str],
    settings: EngineSettings | None = None, columns: Sequence[str] = (),
) -> ValidPairs:  # fmt: skip
    """Select this rank's samples that have every tap, for losses in which row i of one tap belongs
    to row i of the others. `columns` are selected in addition to `sample`."""
    valid = torch.ones_like(meta["sample"], dtype=torch.bool)
    for name in {f"{parse_tap(tap).modality}_present" for tap in taps} & meta.keys():
        valid = valid & meta[name]
    # Skip indexing if no row is missing: it would copy the rows and scatter their gradients.
    all_valid = bool(valid.all())
    selected = {n: meta[n] if all_valid else meta[n][valid] for n in ("sample", *columns)}
    vectors = (outputs[tap] if all_valid else outputs[tap][valid] for tap in taps)
    return ValidPairs(valid, tuple(to_loss_dtype(rows, settings) for rows in vectors), selected)


def valid_rows(
    outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], tap: str,
    settings: EngineSettings, columns: Mapping[str, str],
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Select the valid rows of one tap.

    Args:
        outputs: Tap -> rows. With K captions per sample, a text tap has K rows per sample.
        meta: Columns of the samples.
        tap: Name of the tap.
        settings: Settings whose `precision` is the dtype of the rows.
        columns: New name -> name in `meta`.

    Returns:
        The rows, and their columns under the new names. The additional column `nth` is a row's
        position among its sample's captions.
    """
    rows = to_loss_dtype(outputs[tap], settings)
    selected = {new: meta[name] for new, name in columns.items()}
    per_sample = len(rows) // max(1, len(next(iter(selected.values()))))
    if per_sample > 1:
        selected = {n: column.repeat_interleave(per_sample, 0) for n, column in selected.items()}
    selected["nth"] = torch.arange(len(rows), device=rows.device) % max(1, per_sample)
    valid = meta.get(f"{parse_tap(tap).modality}_present")
    if valid is None:
        return rows, selected
    return rows[valid], {name: column[valid] for name, column in selected.items()}


def to_loss_dtype(rows: Tensor, settings: EngineSettings | None) -> Tensor:
    """Cast rows to `settings.precision`; without settings, return them unchanged."""
    if settings is None:
        return rows
    return rows.to(torch.bfloat16 if settings.precision == "bf16" else torch.float32)


def weighted_mean(values: Tensor, weights: Tensor, ctx: Context) -> Tensor:
    """Return world size x (this rank's part of the weighted mean over all ranks' rows [n])."""
    total = all_sum(weights.detach().sum(), ctx.group)
    return ctx.world_size * (weights * values).sum() / total.clamp(min=1e-12)


def mean_metric(values: Tensor, ctx: Context) -> Tensor:
    """Return the mean over all ranks' rows [n], the same on every rank, without gradient."""
    sums = torch.stack([values.detach().sum(), values.new_tensor(float(len(values)))])
    total, count = all_sum(sums, ctx.group).unbind()
    return total / count.clamp(min=1)


def count_same(ids: Tensor, ctx: Context) -> tuple[Tensor, int]:
    """Count the rows with equal ids over all ranks.

    Args:
        ids: int64 [n].
        ctx: Context with the process group.

    Returns:
        float32 [n], the number of rows of all ranks that have the row's id, including the row; and
        the total number of rows.
    """
    all_ids, _ = torch.sort(gather_rows(ids, ctx.group))
    low, high = (torch.searchsorted(all_ids, ids, right=right) for right in (False, True))
    return (high - low).float(), len(all_ids)


def clamp_inward(x: Tensor, floor: float = -math.inf, ceiling: float = math.inf) -> Tensor:
    """Clamp x to [floor, ceiling]. The gradient is zeroed only where a descent step would move x
    further outside the range.

    `torch.clamp` has no gradient outside the range, so a parameter could never return. Clamping the
    parameter in place fails if the optimizer keeps a separate copy of it.
    """
    clamped: Tensor = _ClampInward.apply(x, floor, ceiling)  # type: ignore[no-untyped-call]
    return clamped


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
