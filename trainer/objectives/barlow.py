"""Barlow Twins (Zbontar et al. 2021), as an addition to CLIP (number 40): no pairs of samples, but
the D x D correlations of two taps' coordinates over the global batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gigabatch.kernels.collect import sum_over_ranks
from gigabatch.trainer.config import BarlowSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.common import paired


class Barlow(Objective):
    about = About(
        "Barlow Twins: the correlations of two views' coordinates shall be the identity",
        "Barlow Twins, Zbontar et al. 2021; as an addition to CLIP, 40",
        "sum_d (C_dd - 1)^2 + off_diagonal sum_{d != e} C_de^2, C the correlations over the batch",
        "3 D / N",
        "an addition, in a sum: CLIP with it has weight 0.025 there",
    )

    def __init__(self, settings: BarlowSettings, group: str | None, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.needs = Needs(settings.taps)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        n, d = outputs[self.settings.taps[0]].shape
        return 3 * d / n

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        a, b = paired(outputs, meta, self.settings.taps).vectors
        # All that leaves a rank are sums, each of which is differentiated on every rank. Means are
        # constants: what sums of centred products would say of them is the centred rows' sum, 0.
        count = sum_over_ranks(torch.stack([a.new_tensor(float(len(a)))]), ctx.group).clamp(min=1)
        sums = torch.stack([a.detach().sum(0), b.detach().sum(0)])
        means = sum_over_ranks(sums, ctx.group) / count
        a, b = a - means[0], b - means[1]
        moments = sum_over_ranks(torch.stack([_square_sums(a), _square_sums(b)]), ctx.group)
        spread = (moments / count).clamp(min=1e-12).sqrt()
        c = sum_over_ranks(a.T @ b, ctx.group) / count / (spread[0].unsqueeze(1) * spread[1])
        diagonal = c.diagonal()
        off = c.square().sum() - diagonal.square().sum()
        value = (diagonal - 1).square().sum() + self.settings.off_diagonal * off
        return Loss(value, {"correlation": diagonal.detach().mean()})


def _square_sums(rows: Tensor) -> Tensor:
    """[D]: sums over rows [n, D] of squares, by norms, whose gradient takes one product where that
    of squares takes three; of some rows at a time, since a norm adds one row after the other."""
    norms = [torch.linalg.vector_norm(part, dim=0) for part in rows.split(256)]
    return torch.stack(norms).square().sum(0)
