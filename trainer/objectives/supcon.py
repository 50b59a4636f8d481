"""Supervised contrastive loss (SupCon, Khosla et al. 2020, eq. 2); without labels, NT-Xent between
views (SimCLR, Chen et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gigabatch.kernels import Eq, Lse, Ne, Rule, key_source, lse_stats
from gigabatch.kernels.loss_terms import cross_entropy
from gigabatch.kernels.sources import global_row_indices
from gigabatch.trainer.fields import Tap
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, over_widths, valid_rows, weighted_mean
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import (
    CachedSettings,
    ScaledSettings,
    WidthsSettings,
    named_fields,
)


class SupConSettings(ScaledSettings, CachedSettings, WidthsSettings):
    name: Literal["supcon"]
    """Samples with the same label are positives of each other, over one or several taps. Without a
    label, the views of one sample are positives (SimCLR)."""
    taps: tuple[Tap, ...] = Field(("image", "image@1"), min_length=1)
    """Tower outputs whose vectors are pooled: views, modalities."""
    positives: str | None = None
    """A json field that holds the label. Unset: every sample is a class of its own."""

    def columns(self) -> tuple[str, ...]:
        return named_fields(self.positives)

    def positives_field(self) -> str | None:
        return self.positives


@register
class SupCon(Scaled[SupConSettings]):
    Settings = SupConSettings
    card = Card(
        "SupCon: samples with the same label are positives; without labels, SimCLR",
        "SupCon, Khosla et al. 2020; SimCLR, Chen et al. 2020",
        "mean_i [log sum_{j != i} exp(l_ij) - mean_{p != i, y_p = y_i} l_ip], over all taps' rows",
        "4 T^2 for T taps",
        "labeled data of one modality; two views of unlabeled images; several modalities at once",
        ("simclr", "nt_xent", "supervised_contrastive", "ntxent"),
    )
    examples = {
        "labels": Example({"taps": ["image"], "positives": "concept"}),
        "simclr": Example(),
        "widths": Example({"widths": [1, 6]}),
    }
    benchmarks = {
        "": Benchmark({"taps": ("image",), "positives": "concept"}),
        "two views": Benchmark({"taps": ("image", "image@1")}, share=0.5),
    }

    def __init__(self, settings: SupConSettings) -> None:
        super().__init__(settings)
        self.needs = Needs(settings.taps, settings.columns())

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 4 * len(self.settings.taps) ** 2

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        label = {"id": settings.positives or "sample"}
        rows = [valid_rows(outputs, meta, tap, settings, label) for tap in settings.taps]
        z, ids = torch.cat([z for z, _ in rows]), torch.cat([columns["id"] for _, columns in rows])
        lse, positive, weight = supcon_stats(z, ids, (), scale, settings, ctx)
        losses = cross_entropy(lse, positive, weight)
        value = weighted_mean(losses, (weight > 0).float(), ctx)
        return Loss(value, {"logit_scale": scale.detach()})

    @staticmethod
    def reference(settings: SupConSettings, batch: ReferenceBatch) -> Value:
        z = torch.cat([batch.outputs[tap] for tap in settings.taps])
        ids = torch.cat([batch.meta[settings.positives or "sample"]] * len(settings.taps))
        diagonal = torch.eye(len(z), dtype=torch.bool)
        logits = (batch.scale * z @ z.T).masked_fill(diagonal, -torch.inf)
        positive = (ids[:, None] == ids[None]) & ~diagonal
        count = positive.sum(1)
        losses = -torch.where(positive, logits.log_softmax(1), 0).sum(1) / count.clamp(min=1)
        return losses[count > 0].mean(), None


def supcon_stats(
    z: Tensor, ids: Tensor, rule: Rule, scale: Tensor, settings: CachedSettings, ctx: Context
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the statistics of SupCon's loss for this rank's rows.

    Args:
        z: float [n, D], unit vectors.
        ids: [n]; rows with equal ids are positives.
        rule: Rule that weighs the other rows; key columns are `id` and `index`.
        scale: 0-dim logit scale.
        settings: Back end, cache and gather mode.
        ctx: Context with the process group.

    Returns:
        [n] each: the log-sum-exp of a row's logits with all other rows, the sum of its positives'
        logits, and the number of its positives.
    """
    indices = global_row_indices(len(z), z.device, ctx.group)
    keys = key_source(z, {"id": ids, "index": indices}, ctx.group, settings.gather_mode)
    # A single equality costs nothing per tile. So a row counts as its own positive here, and is
    # subtracted below.
    stats = lse_stats(
        z, keys, [Lse("rows", scale, None, (*rule, Ne(indices, "index")))], Eq(ids, "id"),
        settings.backend, 2**20 * settings.cache_mib,
    )  # fmt: skip
    weight = stats.weight[0] - 1
    positive = stats.positive[0] - scale * z.float().square().sum(1)
    return stats.z[0], positive, weight
