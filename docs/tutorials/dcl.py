"""Decoupled contrastive learning: InfoNCE without the positive in the denominator."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from gigabatch.kernels import Lse, Ne, key_source, lse_stats
from gigabatch.trainer.fields import Pair
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, valid_pairs, weighted_mean
from gigabatch.trainer.objectives.reference import Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import ScaledSettings


class DCLSettings(ScaledSettings):
    name: Literal["dcl"]
    """InfoNCE whose denominator holds negatives only, which helps small batches."""
    taps: Pair = ("image", "text")
    """The two tower outputs to compare."""


@register
class DCL(Scaled[DCLSettings]):
    Settings = DCLSettings
    card = Card("Decoupled contrastive learning", "DCL, Yeh et al. 2022",
                "mean_i [log sum_{j != i} exp(l_ij) - l_ii], averaged over both directions", "4",
                use="small batches")  # fmt: skip
    examples = {"": Example(missing=True)}

    def __init__(self, settings: DCLSettings) -> None:
        super().__init__(settings)
        self.needs = Needs(settings.taps)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 4

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        pairs = valid_pairs(outputs, meta, self.settings.taps, self.settings)
        (q, k), ids, scale = pairs.vectors, pairs.columns["sample"], self.scale()
        keys = key_source(k, {"id": ids}, ctx.group, self.settings.gather_mode)
        lses = [Lse(axis, scale, None, (Ne(ids, "id"),)) for axis in ("rows", "columns")]
        stats = lse_stats(q, keys, lses, backend=self.settings.backend)
        losses = stats.z[0] + stats.z[1] - 2 * scale * (q.float() * k.float()).sum(1)
        value = weighted_mean(losses / 2, torch.ones_like(losses), ctx)
        return Loss(value, {"logit_scale": scale.detach()})

    @staticmethod
    def reference(settings: DCLSettings, batch: ReferenceBatch) -> Value:
        valid = batch.complete(*settings.taps)  # the samples that have both modalities
        q, k = (batch.outputs[tap][valid] for tap in settings.taps)
        ids, logits = batch.meta["sample"][valid], batch.scale * q @ k.T
        masked = logits.masked_fill(ids[:, None] == ids[None], -torch.inf)
        lse = (masked.logsumexp(1) + masked.logsumexp(0)) / 2
        return (lse - logits.diagonal()).mean(), None
