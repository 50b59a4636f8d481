"""Barlow Twins (Zbontar et al. 2021): a loss on the D x D correlations between two taps'
coordinates over the global batch, not on pairs of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gigabatch.kernels.collect import sum_over_ranks
from gigabatch.trainer.fields import Pair
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.common import valid_pairs
from gigabatch.trainer.objectives.reference import Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import SingleSettings


class BarlowSettings(SingleSettings):
    name: Literal["barlow"]
    """Barlow Twins: make the correlation matrix of two taps' coordinates the identity. Add it to
    another objective in a `sum`."""
    taps: Pair = ("image", "image@1")
    """The two tower outputs to correlate."""
    off_diagonal: float = Field(0.005, ge=0)
    """Weight of the correlations off the diagonal."""


@register
class Barlow(Objective[BarlowSettings]):
    Settings = BarlowSettings
    card = Card(
        "Barlow Twins: make the correlation matrix of two views' coordinates the identity",
        "Barlow Twins, Zbontar et al. 2021",
        "sum_d (C_dd - 1)^2 + off_diagonal sum_{d != e} C_de^2; C are correlations over the batch",
        "3 D / N",
        "added to another objective in a `sum`, for example to `infonce` with a weight of 0.025",
        ("barlow_twins", "vicreg"),
    )
    examples = {"": Example(missing=True)}

    def __init__(self, settings: BarlowSettings) -> None:
        super().__init__(settings)
        self.needs = Needs(settings.taps)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        n, d = outputs[self.settings.taps[0]].shape
        return 3 * d / n

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        a, b = valid_pairs(outputs, meta, self.settings.taps).vectors
        # Ranks exchange only sums, and every rank differentiates them. The means are constants: the
        # gradient through them would be a sum of centered rows, which is 0.
        count = sum_over_ranks(torch.stack([a.new_tensor(float(len(a)))]), ctx.group).clamp(min=1)
        means = (
            sum_over_ranks(torch.stack([a.detach().sum(0), b.detach().sum(0)]), ctx.group) / count
        )
        a, b = a - means[0], b - means[1]
        moments = sum_over_ranks(torch.stack([_square_sums(a), _square_sums(b)]), ctx.group)
        deviation = (moments / count).clamp(min=1e-12).sqrt()
        c = sum_over_ranks(a.T @ b, ctx.group) / count / (deviation[0].unsqueeze(1) * deviation[1])
        diagonal = c.diagonal()
        off = c.square().sum() - diagonal.square().sum()
        value = (diagonal - 1).square().sum() + self.settings.off_diagonal * off
        return Loss(value, {"correlation": diagonal.detach().mean()})

    @staticmethod
    def reference(settings: BarlowSettings, batch: ReferenceBatch) -> Value:
        valid = batch.complete(*settings.taps)
        views = (batch.outputs[tap][valid] for tap in settings.taps)
        a, b = ((rows - rows.mean(0)) / rows.std(0, correction=0) for rows in views)
        c = a.T @ b / len(a)
        on = torch.eye(len(c), dtype=torch.bool)
        return ((c - 1) ** 2)[on].sum() + settings.off_diagonal * (c**2)[~on].sum(), None


def _square_sums(rows: Tensor) -> Tensor:
    """Return [D]: the sums of squares over rows [n, D].

    The gradient of a norm takes one elementwise product, that of squares three. `vector_norm` adds
    rows one after another, so it is applied to parts of 256 rows, which keeps precision.
    """
    norms = [torch.linalg.vector_norm(part, dim=0) for part in rows.split(256)]
    return torch.stack(norms).square().sum(0)
