"""Supervised contrast (SupCon, Khosla et al. 2020, eq. 2), and without labels NT-Xent between
views (SimCLR, Chen et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gigabatch.kernels import Eq, Lse, Ne, Rule, key_source, lse_stats
from gigabatch.kernels.loss_terms import cross_entropy
from gigabatch.kernels.sources import global_row_indices
from gigabatch.trainer.config import ScaledSettings, SupConSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, over_widths, present, weighted_mean


class SupCon(Scaled):
    about = About(
        "SupCon: all samples of a label attract each other; without labels SimCLR",
        "SupCon, Khosla et al. 2020; SimCLR, Chen et al. 2020; with any metadata column: 27",
        "mean_i [log sum_{j != i} exp(l_ij) - mean_{p != i, y_p = y_i} l_ip], over all taps' rows",
        "4 T^2 for T taps",
        "labelled data of one modality; two views of unlabelled images; several modalities at once",
    )

    def __init__(self, settings: SupConSettings, group: str | None, width: int) -> None:
        super().__init__(settings)
        self.settings = settings
        self.needs = Needs(settings.taps, (settings.positives,) if settings.positives else ())

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 4 * len(self.settings.taps) ** 2

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        label = {"id": settings.positives or "sample"}
        found = [present(outputs, meta, tap, settings, label) for tap in settings.taps]
        z, ids = torch.cat([rows for rows, _ in found]), torch.cat([c["id"] for _, c in found])
        total, positive, weight = among(z, ids, (), scale, settings, ctx)
        each = cross_entropy(total, positive, weight)
        value = weighted_mean(each, (weight > 0).float(), ctx)
        return Loss(value, {"logit_scale": scale.detach()})


def among(
    z: Tensor, ids: Tensor, rule: Rule, scale: Tensor, settings: ScaledSettings, ctx: Context
) -> tuple[Tensor, Tensor, Tensor]:
    """Of SupCon's loss [n]: the log-sum-exp of each row's logits with all others, the sum over
    those of its id, and how many these are. `rule`: how the others weigh, by the columns `id` and
    `number`."""
    numbers = global_row_indices(len(z), z.device, ctx.group)
    keys = key_source(z, {"id": ids, "number": numbers}, ctx.group, settings.gather_mode)
    # A lone equality costs nothing a tile: each row is among its own positives, and then taken
    # off again.
    stats = lse_stats(
        z, keys, [Lse("rows", scale, None, (*rule, Ne(numbers, "number")))], Eq(ids, "id"),
        settings.backend, 2**20 * settings.cache_mib,
    )  # fmt: skip
    weight = stats.weight[0] - 1
    positive = stats.positive[0] - scale * z.float().square().sum(1)
    return stats.z[0], positive, weight
