"""InfoNCE with structured hard negatives: additional wrong captions, or pairs of an original and a
changed sample. Each relation has its own weight (TACT, Bagad et al. 2023; TeminAL)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gigabatch.kernels import Eq, Lse, Table, key_source, lse_stats
from gigabatch.kernels.loss_terms import cross_entropy
from gigabatch.trainer.fields import Pair
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, over_widths, valid_rows, weighted_mean
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import (
    CachedSettings,
    ScaledSettings,
    WidthsSettings,
    named_fields,
    unique,
)
from gigabatch.trainer.taps import parse_tap

if TYPE_CHECKING:  # The config is built from the objectives.
    from gigabatch.trainer.config import Config

ZERO_WEIGHT = 1e-30
"""Replaces a weight of 0, so that its logarithm is finite."""


class HardNegativesSettings(ScaledSettings, CachedSettings, WidthsSettings):
    takes_several_captions = True

    name: Literal["hard_negatives"]
    """InfoNCE with purpose-made hard negatives, weighted by their relation to the row. With
    data.captions.choose=all, a sample's first caption is its positive and its other captions are
    such negatives; a sample whose first caption is empty has no positive and is not used.
    Otherwise, samples come in pairs of an original and a changed one, for example reversed in
    time."""
    taps: Pair = ("image", "text")
    """The two tower outputs to compare."""
    pair: str | None = None
    """A json field that an original and its changed sample share. Requires `changed`."""
    changed: str | None = None
    """A json field: 0 for an original, 1 for a changed sample. Requires `pair`."""
    own_weight: float = Field(1.0, ge=0)
    """Weight of a row's own changed counterpart among its negatives."""
    other_weight: float = Field(1.0, ge=0)
    """Weight of other rows' changed counterparts; 0 leaves them out."""
    changed_weight: float = Field(1.0, ge=0)
    """Weight of a changed sample's row in the mean; an original's is 1."""

    def columns(self) -> tuple[str, ...]:
        return named_fields(self.pair, self.changed)

    def flags(self) -> tuple[str, ...]:
        return named_fields(self.changed)

    def ordered_texts(self) -> tuple[str, ...]:
        return unique(parse_tap(tap).modality for tap in self.taps)

    def check(self, config: Config) -> None:
        captions = config.data.captions
        has_negatives = captions.choose == "all" and captions.most > 1
        if self.pair is None and not has_negatives and config.data.fields_version > 1:
            raise ValueError(
                f"objective.name={self.name}: with data.captions.choose={captions.choose} and "
                f"most={captions.most}, samples have no hard negatives. Set data.captions.choose="
                "all and most to at least 2 (the positive, then its negatives), or "
                "objective.pair and objective.changed"
            )
        super().check(config)

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if (self.pair is None) != (self.changed is None):
            raise ValueError("set both `pair` and `changed`, or neither")
        return self


@register
class HardNegatives(Scaled[HardNegativesSettings]):
    Settings = HardNegativesSettings
    card = Card(
        "InfoNCE with purpose-made hard negatives, weighted by relation",
        "TACT, Bagad et al. 2023; TeminAL; mined negatives, as in E5",
        "mean_i [log sum_j w_ij exp(l_ij) - l_ii], averaged over both directions; w_ij is "
        "own_weight for i's own changed counterpart, other_weight for those of other rows, else 1",
        "4 K for K captions",
        "word order and negation, which a plain contrastive loss ignores; mined negatives. Keep "
        "ordinary pairs in the data, or the model forgets them",
        ("triplet", "negclip", "hard_negative", "tact"),
    )
    examples = {
        "captions": Example({"own_weight": 2.0, "other_weight": 0.5}, captions=3),
        "captions, widths": Example(
            {"own_weight": 2.0, "other_weight": 0.5, "widths": [3, 6]}, captions=3
        ),
        "pairs": Example(
            {"pair": "concept", "changed": "lang", "own_weight": 3.0, "other_weight": 0.0,
             "changed_weight": 0.4}
        ),
    }  # fmt: skip
    benchmarks = {
        "both weights": Benchmark(
            {"pair": "pair", "changed": "changed", "own_weight": 2.0, "other_weight": 0.5}
        ),
        "two captions": Benchmark({"own_weight": 2.0}, share=0.5**0.5, captions=2),
    }

    def __init__(self, settings: HardNegativesSettings) -> None:
        super().__init__(settings)
        self.needs = Needs(settings.taps, settings.columns())

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        rows_q, rows_k = (len(outputs[tap]) for tap in self.settings.taps)
        return 4 * max(rows_q, rows_k) / min(rows_q, rows_k)

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        names = {"id": "sample", "pair": settings.pair or "sample"}
        if settings.changed:
            names["changed"] = settings.changed
        q, columns_q = valid_rows(outputs, meta, settings.taps[0], settings, names)
        k, columns_k = valid_rows(outputs, meta, settings.taps[1], settings, names)
        changed_q, changed_k = _changed(columns_q), _changed(columns_k)
        positive_ids = torch.where(columns_k["nth"] == 0, columns_k["id"], -1)
        columns = {"id": positive_ids, "pair": columns_k["pair"], "changed": changed_k}
        keys = key_source(k, columns, ctx.group, settings.gather_mode)
        own = settings.own_weight or ZERO_WEIGHT
        log_other = math.log(settings.other_weight or ZERO_WEIGHT)
        rule = [Table(changed_q, "changed", _between(log_other, q))] if log_other else []
        if math.log(own) != log_other:
            table = _between(math.log(own) - log_other, q)
            rule.append(Table(changed_q, "changed", table, Eq(columns_q["pair"], "pair")))
        stats = lse_stats(
            q, keys, [Lse("rows", scale, None, rule), Lse("columns", scale, None, rule)],
            Eq(columns_q["id"], "id"), settings.backend, 2**20 * settings.cache_mib,
        )  # fmt: skip
        losses = []
        for side, changed in enumerate((changed_q, changed_k)):
            z, positive, weight = stats.z[side], stats.positive[side], stats.weight[side]
            row_weight = torch.where(changed == 1, settings.changed_weight, 1.0) * (weight > 0)
            losses.append(weighted_mean(cross_entropy(z, positive, weight), row_weight, ctx))
        return Loss(torch.stack(losses).mean(), {"logit_scale": scale.detach()})

    @staticmethod
    def reference(settings: HardNegativesSettings, batch: ReferenceBatch) -> Value:
        image, text = (batch.outputs[tap] for tap in settings.taps)
        meta, per, n = batch.meta, len(text) // len(image), len(image)
        sample_of_text, nth = torch.arange(len(text)) // per, torch.arange(len(text)) % per
        changed_q = torch.zeros(n, dtype=torch.bool)
        if settings.changed:
            changed_q = meta[settings.changed] != 0
        changed_k = changed_q[sample_of_text] | (nth > 0)
        pair = meta[settings.pair or "sample"]
        same_pair = pair[:, None] == pair[sample_of_text][None]
        negative = torch.where(same_pair, settings.own_weight, settings.other_weight)
        weight = torch.where(changed_q[:, None] != changed_k[None], negative, 1.0).double()
        same = meta["sample"][:, None] == meta["sample"][sample_of_text][None]
        positive = same & (nth == 0)[None]
        logits = batch.scale * image @ text.T
        mass = weight * torch.exp(logits)
        directions = []
        for m, x, is_positive, changed in (
            (mass, logits, positive, changed_q), (mass.T, logits.T, positive.T, changed_k),
        ):  # fmt: skip
            count = is_positive.sum(1)
            losses = m.sum(1).log() - (x * is_positive).sum(1) / count.clamp(min=1)
            row_weight = torch.where(changed, settings.changed_weight, 1.0).double() * (count > 0)
            losses = torch.where(count > 0, losses, 0)
            directions.append((losses * row_weight).sum() / row_weight.sum())
        return (directions[0] + directions[1]) / 2, None


def _changed(columns: Mapping[str, Tensor]) -> Tensor:
    """Return int64 [n]: 1 for a further caption or a row of a changed sample, else 0."""
    further = columns["nth"] > 0
    return (further if "changed" not in columns else further | (columns["changed"] != 0)).long()


def _between(log_weight: float, like: Tensor) -> Tensor:
    """Return a table [2, 2]: `log_weight` between a changed and an unchanged row, else 0."""
    return torch.tensor([[0.0, log_weight], [log_weight, 0.0]], device=like.device)
