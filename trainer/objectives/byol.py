"""BYOL (Grill et al. 2020): predict a momentum tower's vector of one view from the other view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.trainer.fields import Count, Fraction, Pair
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.common import valid_pairs, weighted_mean
from gigabatch.trainer.objectives.reference import Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import SingleSettings, unique
from gigabatch.trainer.taps import TEACHER, parse_tap


class BYOLSettings(SingleSettings):
    name: Literal["byol"]
    """BYOL: predict a momentum tower's vectors of one view from the other view, without negatives.
    Add it to another objective in a `sum`."""
    taps: Pair = ("image", "image@1")
    """The two views; each predicts the other. The momentum tower gets a separate view of each
    modality."""
    momentum: Fraction = 0.99
    """Momentum of the momentum tower's weights, per step."""
    hidden: Count = 512
    """Hidden width of the predictor."""

    def momentum_tower(self) -> float | None:
        return self.momentum


@register
class BYOL(Objective[BYOLSettings]):
    Settings = BYOLSettings
    card = Card(
        "BYOL: predict a momentum tower's vectors of the other view; no negatives",
        "BYOL, Grill et al. 2020",
        "mean_i [2 - 2 cos(p(a_i), teacher_b_i)], averaged over both directions; no gradient "
        "through the teacher",
        "12 hidden / N, and one more forward pass of the towers",
        "added to another objective in a `sum`",
        ("simsiam",),
    )
    examples = {"": Example({"hidden": 5})}

    def __init__(self, settings: BYOLSettings, width: int) -> None:
        super().__init__(settings)
        # The momentum tower's input is augmented again, so a base tap already is a different view.
        self.teacher_taps = [parse_tap(tap).base for tap in settings.taps]
        teacher = unique(self.teacher_taps)
        self.needs = Needs(settings.taps, teacher=teacher, momentum=settings.momentum)
        # Layer norm, because the statistics of a batch norm would differ between ranks.
        self.predictor = nn.Sequential(
            nn.Linear(width, settings.hidden), nn.LayerNorm(settings.hidden), nn.ReLU(),
            nn.Linear(settings.hidden, width),
        )  # fmt: skip

    @classmethod
    def build(cls, settings: BYOLSettings, *, group: str | None = None, width: int = 0) -> Self:
        return cls(settings, width)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 12 * self.settings.hidden / len(outputs[self.settings.taps[0]])

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        taps = (*self.settings.taps, *(TEACHER + tap for tap in self.teacher_taps))
        a, b, teacher_a, teacher_b = valid_pairs(outputs, meta, taps).vectors
        directions = [
            2 - 2 * F.cosine_similarity(self.predictor(rows), target, dim=1)
            for rows, target in ((a, teacher_b), (b, teacher_a))
        ]
        losses = torch.stack(directions).mean(0)
        return Loss(weighted_mean(losses, torch.ones_like(losses), ctx))

    @staticmethod
    def reference(settings: BYOLSettings, batch: ReferenceBatch) -> Value:
        p = batch.parameters

        def predict(x: Tensor) -> Tensor:
            h = x @ p["predictor.0.weight"].T + p["predictor.0.bias"]
            h = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            h = torch.relu(h * p["predictor.1.weight"] + p["predictor.1.bias"])
            return h @ p["predictor.3.weight"].T + p["predictor.3.bias"]

        losses = []
        for tap, other in (settings.taps, settings.taps[::-1]):
            x = predict(batch.outputs[tap])
            target = batch.outputs[TEACHER + other.partition("@")[0]]
            losses.append(2 - 2 * (x * target).sum(1) / (x.norm(dim=1) * target.norm(dim=1)))
        return (losses[0].mean() + losses[1].mean()) / 2, None
