"""Sigmoid loss (SigLIP, Zhai et al. 2023). It has no normalizer, which saves one matrix pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gigabatch.kernels import sigmoid_loss
from gigabatch.trainer.fields import Pair
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.common import clamp_inward, over_widths, valid_pairs
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import EngineSettings, WidthsSettings, named_fields


class SigLIPSettings(EngineSettings, WidthsSettings):
    name: Literal["siglip"]
    """SigLIP's sigmoid loss: a binary classification of every pair of the batch."""
    taps: Pair = ("image", "text")
    """The two tower outputs to compare."""
    positives: str | None = None
    """A json field; pairs of different samples with equal values are left out."""
    init_logit_scale: float = Field(10.0, gt=0)
    """Initial logit scale (inverse temperature)."""
    scale_max: float = Field(200.0, gt=0)
    """Largest logit scale in the forward pass."""
    bias: float = -10.0
    """Initial logit bias; negative because most pairs are negatives."""

    def columns(self) -> tuple[str, ...]:
        return named_fields(self.positives)

    def positives_field(self) -> str | None:
        return self.positives


@register
class SigLIP(Objective[SigLIPSettings]):
    Settings = SigLIPSettings
    card = Card(
        "SigLIP's sigmoid loss, a binary classification of each pair",
        "SigLIP, Zhai et al. 2023",
        "1/N sum_ij log(1 + exp(-y_ij (logit scale <q_i, k_j> + bias))), y = 1 for pairs, else -1",
        "3",
        "paired data; less work than InfoNCE, and less sensitive to the batch size",
        ("sigmoid", "sigmoid_loss", "sigliploss"),
    )
    examples = {
        "": Example({"bias": -2.0}),
        "same ids left out": Example({"bias": -2.0, "positives": "concept"}, missing=True),
        "widths, rows missing": Example({"bias": -2.0, "widths": [3, 6]}, missing=True),
    }
    benchmarks = {"": Benchmark(), "positives": Benchmark({"positives": "concept"})}

    def __init__(self, settings: SigLIPSettings) -> None:
        super().__init__(settings)
        self.needs = Needs(settings.taps, settings.columns())
        self.log_scale_max = math.log(settings.scale_max)
        self.log_scale = nn.Parameter(torch.tensor(math.log(settings.init_logit_scale)))
        self.bias = nn.Parameter(torch.tensor(settings.bias))

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 3

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        settings = self.settings
        scale = clamp_inward(self.log_scale, ceiling=self.log_scale_max).exp()
        pairs = valid_pairs(outputs, meta, settings.taps, settings, self.needs.columns)
        q, k = pairs.vectors
        value = sigmoid_loss(
            q, k, scale, self.bias, ids=pairs.columns[settings.positives or "sample"],
            group=ctx.group, gather_mode=settings.gather_mode, backend=settings.backend,
        )  # fmt: skip
        return Loss(value, {"logit_scale": scale.detach(), "logit_bias": self.bias.detach()})

    @staticmethod
    def reference(settings: SigLIPSettings, batch: ReferenceBatch) -> Value:
        valid = batch.complete(*settings.taps)
        image, text = (batch.outputs[tap][valid] for tap in settings.taps)
        ids = batch.meta[settings.positives or "sample"][valid]
        logits = batch.scale * image @ text.T + batch.parameters["bias"]
        diagonal = torch.eye(len(ids), dtype=torch.bool)
        losses = F.softplus(torch.where(diagonal, -logits, logits))
        counted = diagonal | (ids[:, None] != ids[None])
        return (losses * counted).sum() / len(ids), None
