"""Pairs of which many do not belong together (PC2, number 1; NCR, Huang et al. 2021), on dual
encoders: a split by the samples' own losses, which are small where a pair is clean, since networks
learn what is regular first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gigabatch.kernels import Eq, Lse, Ne, key_source, lse_stats
from gigabatch.kernels.loss_terms import cross_entropy, hinge_hardest, hinge_mean
from gigabatch.trainer.config import NoisySettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs, Updates
from gigabatch.trainer.objectives.common import (
    Scaled,
    count_same,
    mean_metric,
    paired,
    weighted_mean,
)
from gigabatch.trainer.objectives.gmm import clean_probability, fit_split
from gigabatch.trainer.objectives.tables import SampleTable


class Noisy(Scaled):
    about = About(
        "Noise-robust InfoNCE: each pair counts by how likely it is clean",
        "PC2, 1; NCR, Huang et al. 2021; the split: DivideMix, Li et al. 2020",
        "sum_i w_i CE_i / sum_i w_i, w_i = P(clean | the loss of i an epoch ago) by a mixture of "
        "two Gaussians; or the hardest-negative hinge, margin_i = margin (curve^w_i - 1) / "
        "(curve - 1)",
        "4 (softmax); 2 (hinge; 8 until the first split)",
        "captions from the web, many of which do not fit their image",
    )

    def __init__(self, settings: NoisySettings, group: str | None, width: int) -> None:
        super().__init__(settings)
        self.settings = settings
        # What a sample's loss was when it came last; NaN: it has not come yet.
        self.needs = Needs(settings.taps, tables={"loss": (torch.nan,)})
        self.register_buffer("split", torch.zeros(2, 3))  # variance 0: not yet

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 4 if self.settings.head == "softmax" else 2 if self._is_split else 8

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        rows = paired(outputs, meta, settings.taps, settings)
        q, k = rows.vectors
        ids, clean = rows.columns["sample"], self._clean(meta["loss"][rows.here, 0])
        if settings.head == "hinge":
            each = self._hinge(q, k, ids, clean, ctx)
            value = weighted_mean(each, torch.ones_like(each), ctx)
        else:
            each = self._cross_entropy(q, k, scale, ids, ctx)
            value = weighted_mean(each, clean, ctx)

        def updates() -> Updates:
            table = meta["loss"].clone()
            table[rows.here, 0] = each.detach()
            return {"loss": table}

        return Loss(
            value, {"logit_scale": scale.detach(), "clean": mean_metric(clean, ctx)}, updates
        )

    def on_epoch(self, tables: Mapping[str, SampleTable], ctx: Context) -> Updates:
        if ctx.epoch < self.settings.warmup_epochs:
            return {}
        table = tables["loss"]
        known = table.shard[:, 0]
        return {"split": fit_split(known[~known.isnan()], table.world).float()}

    def of_samples(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = tables["loss"][:, 0]
        if not self._is_split:
            return {"loss": losses}
        clean = torch.where(losses.isnan(), torch.nan, self._clean(losses))
        return {"loss": losses, "clean_probability": clean}

    @property
    def _is_split(self) -> bool:
        return bool((self.get_buffer("split")[:, 1] > 0).all())

    def _clean(self, losses: Tensor) -> Tensor:
        """[n] in [0, 1]; 1 for samples that come for the first time, and before the first split."""
        if not self._is_split:
            return torch.ones_like(losses)
        found = clean_probability(losses, self.get_buffer("split"))
        return torch.where(losses.isnan(), 1, found)

    def _cross_entropy(
        self, q: Tensor, k: Tensor, scale: Tensor, ids: Tensor, ctx: Context
    ) -> Tensor:
        """[n]: of each pair, both ways, halved."""
        keys = key_source(k, {"id": ids}, ctx.group, self.settings.gather_mode)
        stats = lse_stats(
            q, keys, [Lse("rows", scale), Lse("columns", scale)], Eq(ids, "id"),
            self.settings.backend, 2**20 * self.settings.cache_mib,
        )  # fmt: skip
        ways = zip(stats.z, stats.positive, stats.weight, strict=True)
        return torch.stack([cross_entropy(*way) for way in ways]).mean(0)

    def _hinge(self, q: Tensor, k: Tensor, ids: Tensor, clean: Tensor, ctx: Context) -> Tensor:
        settings, backend = self.settings, self.settings.backend
        margin = settings.margin * (settings.curve**clean - 1) / (settings.curve - 1)
        own, others = (q.float() * k.float()).sum(1), (Ne(ids, "id"),)
        same, total = count_same(ids, ctx)
        each = torch.zeros_like(own)
        for mine, theirs in ((q, k), (k, q)):
            keys = key_source(theirs, {"id": ids}, ctx.group, settings.gather_mode)
            if self._is_split:
                each = each + hinge_hardest(mine, keys, others, own, margin, backend)
            else:
                each = each + hinge_mean(mine, keys, others, own, margin, total - same, backend)
        return each / 2
