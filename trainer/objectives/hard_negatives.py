"""InfoNCE with structured hard negatives: further captions that are wrong, or pairs of an original
and a changed sample, each relation with its own weight (TestOfTime's TACT, Bagad et al. 2023;
TeminAL, number 36; generated hard negatives, number 39)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gigabatch.kernels import Eq, Lse, Table, key_source, lse_stats
from gigabatch.kernels.loss_terms import cross_entropy
from gigabatch.trainer.config import HardNegativesSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, over_widths, present, weighted_mean

NOTHING = 1e-30  # a weight of 0: its logarithm can be added and taken off again


class HardNegatives(Scaled):
    about = About(
        "InfoNCE with hard negatives made for the purpose, weighted by relation",
        "TACT, Bagad et al. 2023; TeminAL, 36; generated negatives, 39; mined ones, as in E5",
        "mean_i [log sum_j w_ij exp(l_ij) - l_ii], both ways, halved; w_ij = own_weight for i's "
        "own changed counterpart, other_weight for others', else 1",
        "4 K for K captions",
        "order and negation, which plain contrast is blind to; mined negatives. Keep old pairs in "
        "the mix, or what was learnt before is lost",
    )

    def __init__(self, settings: HardNegativesSettings, group: str | None, width: int) -> None:
        super().__init__(settings)
        self.settings = settings
        columns = (settings.pair, settings.changed) if settings.pair and settings.changed else ()
        self.needs = Needs(settings.taps, columns)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        of_q, of_k = (len(outputs[tap]) for tap in self.settings.taps)
        return 4 * max(of_q, of_k) / min(of_q, of_k)

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        names = {"id": "sample", "pair": settings.pair or "sample"}
        if settings.changed:
            names["changed"] = settings.changed
        q, of_q = present(outputs, meta, settings.taps[0], settings, names)
        k, of_k = present(outputs, meta, settings.taps[1], settings, names)
        changed_q, changed_k = _changed(of_q), _changed(of_k)
        right = torch.where(of_k["nth"] == 0, of_k["id"], -1)
        columns = {"id": right, "pair": of_k["pair"], "changed": changed_k}
        keys = key_source(k, columns, ctx.group, settings.gather_mode)
        other, own = math.log(settings.other_weight or NOTHING), settings.own_weight or NOTHING
        rule = [Table(changed_q, "changed", _apart(other, q))] if other else []
        if math.log(own) != other:
            table = _apart(math.log(own) - other, q)
            rule.append(Table(changed_q, "changed", table, Eq(of_q["pair"], "pair")))
        stats = lse_stats(
            q, keys, [Lse("rows", scale, None, rule), Lse("columns", scale, None, rule)],
            Eq(of_q["id"], "id"), settings.backend, 2**20 * settings.cache_mib,
        )  # fmt: skip
        losses = []
        for side, changed in enumerate((changed_q, changed_k)):
            z, positive, weight = stats.z[side], stats.positive[side], stats.weight[side]
            counts = torch.where(changed == 1, settings.changed_weight, 1.0) * (weight > 0)
            losses.append(weighted_mean(cross_entropy(z, positive, weight), counts, ctx))
        return Loss(torch.stack(losses).mean(), {"logit_scale": scale.detach()})


def _changed(columns: Mapping[str, Tensor]) -> Tensor:
    """1 for what was changed: by its sample's column, or since it is no first caption."""
    made = columns["nth"] > 0
    return (made if "changed" not in columns else made | (columns["changed"] != 0)).long()


def _apart(log_weight: float, like: Tensor) -> Tensor:
    """The log-weights [2, 2] of what is changed against what is not, and the other way round."""
    return torch.tensor([[0.0, log_weight], [log_weight, 0.0]], device=like.device)
