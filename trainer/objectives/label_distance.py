"""A contrastive loss for continuous labels (SupReMix, Wu et al. 2024). Negatives are weighted by
the distance of their labels, and mixtures of rows are additional keys.

Mixtures are constants and are not normalized. A hard negative of row i is lam z_i + (1 - lam) z_j,
for every j with a different label. Its label is (1 - lam) |y_i - y_j| away from i's. Its score is
lam s_ii + (1 - lam) s_ij: existing scores, scaled and shifted per row. A hard positive is
lam z_j + (1 - lam) z_k of two rows whose labels enclose y_i within the window, with lam such that
the mixture's label is y_i. The paper uses all such pairs, N^2 per row. Here each row draws some of
them, seeded by run and step, and a row's hard negatives share one lam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gigabatch.data.rng import key, uniforms
from gigabatch.kernels import AbsDiff, Lse, Ne, gather_rows, key_source, lse_stats, take
from gigabatch.kernels.loss_terms import cross_entropy
from gigabatch.kernels.sources import KeySource, all_sum, global_row_indices
from gigabatch.trainer.fields import Amount, Tap
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, over_widths, valid_rows, weighted_mean
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import CachedSettings, ScaledSettings, WidthsSettings
from gigabatch.trainer.objectives.supcon import supcon_stats

BETA = (2, 8)
"""Parameters of the beta distribution of lam in hard negatives. It is drawn as the second smallest
of nine uniform numbers."""
VIEWS = ["image", "image@1"]


class LabelDistanceSettings(ScaledSettings, CachedSettings, WidthsSettings):
    name: Literal["label_distance"]
    """SupCon for continuous labels: samples with the same label are positives, and negatives with a
    more distant label get a larger weight."""
    taps: tuple[Tap, ...] = Field(("image", "image@1"), min_length=1)
    """Tower outputs whose vectors are pooled: views, modalities."""
    label: str
    """A json field that holds a number."""
    distance: float = Field(1.0, ge=0)
    """A negative's weight is 1 + distance |y_i - y_j|."""
    mixed_negatives: bool = False
    """Add a negative for each row with a different label: its mixture with the row itself, which is
    harder. Mixtures are constants. Costs three more matrix passes."""
    mixed_positives: Amount = 0
    """Number of additional positives per row, each a mixture of two rows whose labels are below and
    above its own. Mixtures are constants."""
    window: float = Field(5.0, gt=0)
    """mixed_positives: largest distance of the two labels from the row's, in the label's units."""

    def columns(self) -> tuple[str, ...]:
        return (self.label,)

    def numbers(self) -> tuple[str, ...]:
        return (self.label,)


@register
class LabelDistance(Scaled[LabelDistanceSettings]):
    Settings = LabelDistanceSettings
    card = Card(
        "SupCon for continuous labels: more distant labels weigh more as negatives",
        "SupReMix, Wu et al. 2024",
        "mean_i [log sum_{j != i} (1 + distance |y_i - y_j|) exp(l_ij) - mean_{p != i, y_p = y_i} "
        "l_ip]; mixed_negatives adds keys lam z_i + (1 - lam) z_j, mixed_positives positives "
        "lam z_j + (1 - lam) z_k with y_j < y_i < y_k",
        "4 T^2 for T taps; with mixed_negatives 7 T^2",
        "regression: ages, depths, doses, prices",
        ("supremix", "rnc", "rank_n_contrast", "regression"),
    )
    examples = {
        "": Example({"label": "age", "distance": 2.0}),
        "widths": Example({"label": "age", "distance": 2.0, "widths": [3, 6]}),
        "mixed negatives": Example(
            {"label": "age", "distance": 2.0, "mixed_negatives": True}, missing=True
        ),
        "mixed positives": Example({"label": "age", "mixed_positives": 3, "window": 0.8}),
        "all mixtures": Example(
            {"label": "age", "mixed_negatives": True, "mixed_positives": 2, "taps": ["image"]},
            missing=True,
        ),
    }
    benchmarks = {
        "": Benchmark({"label": "age", "taps": VIEWS}, share=0.5),
        "mixtures": Benchmark(
            {"label": "age", "taps": VIEWS, "mixed_negatives": True, "mixed_positives": 2},
            share=0.5,
        ),
    }

    def __init__(self, settings: LabelDistanceSettings) -> None:
        super().__init__(settings)
        self.needs = Needs(settings.taps, numeric_columns=(settings.label,))

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return (4 + 3 * self.settings.mixed_negatives) * len(self.settings.taps) ** 2

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        taps = [
            valid_rows(outputs, meta, tap, settings, {"label": settings.label})
            for tap in settings.taps
        ]
        z, y = torch.cat([z for z, _ in taps]), torch.cat([c["label"] for _, c in taps])
        rule = (AbsDiff(y, "id", torch.full_like(y, settings.distance)),)
        total, positive, weight = supcon_stats(z, y, rule, scale, settings, ctx)
        if settings.mixed_negatives or settings.mixed_positives:
            keys = key_source(z.detach(), {"label": y}, ctx.group, settings.gather_mode)
            rows = Rows(z, y, keys, _row_indices([len(z) for z, _ in taps], z.device, ctx))
            parts = [total[None]]
            if settings.mixed_negatives:
                parts.append(self._negatives(rows, scale, ctx)[None])
            if settings.mixed_positives:
                scores, real = self._positives(rows, ctx)
                parts.append((scale * scores).masked_fill(~real, -torch.inf).T)
                positive = positive + (scale * scores * real).sum(1)
                weight = weight + real.sum(1)
            total = _logsumexp(torch.cat(parts))
        losses = cross_entropy(total, positive, weight)
        value = weighted_mean(losses, (weight > 0).float(), ctx)
        return Loss(value, {"logit_scale": scale.detach()})

    def _negatives(self, rows: Rows, scale: Tensor, ctx: Context) -> Tensor:
        """Return [n]: the log-sum-exp over a row's mixtures with all rows of other labels."""
        a, b = BETA
        uniform = rows.uniforms(key(ctx.seed, "mixed negatives", ctx.step), a + b - 1)
        lam = uniform.sort(1).values[:, a - 1]
        distance = AbsDiff(rows.y, "label", (1 - lam) * self.settings.distance)
        lse = Lse("rows", scale * (1 - lam), None, (distance, Ne(rows.y, "label")))
        (z,) = lse_stats(rows.z, rows.keys, [lse], backend=self.settings.backend).z
        self_score = (rows.z.float() * rows.z.detach().float()).sum(1)
        return z + scale * lam * self_score

    def _positives(self, rows: Rows, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return [n, mixtures] each: scores of a row's mixed positives, and a mask of those that
        exist."""
        settings, count = self.settings, self.settings.mixed_positives
        rng_key = key(ctx.seed, "mixed positives", ctx.step)
        uniform = rows.uniforms(rng_key, 2 * count).view(-1, count, 2)
        y, all_labels = rows.y[:, None], gather_rows(rows.y, ctx.group)
        indices = gather_rows(rows.indices, ctx.group)
        order = indices.argsort()  # the same for any number of ranks
        order = order[all_labels[order].argsort(stable=True)]
        labels, empty = all_labels[order].contiguous(), y.new_zeros(len(y), count)
        below = _draw_positions(labels, y - settings.window, y, False, uniform[..., 0])
        above = _draw_positions(labels, y, y + settings.window, True, uniform[..., 1])
        real = (below >= 0) & (above >= 0)
        if not len(order):
            return empty, real
        index = torch.stack([torch.where(real, at, 0) for at in (below, above)])
        y_j, y_k = labels[index]
        lam = torch.where(real, (y_k - y) / (y_k - y_j), 0).unsqueeze(2)
        chosen = torch.where(real, order[index], -1).flatten()
        z_j, z_k = take(rows.keys, chosen).keys.float().view(2, *real.shape, rows.z.shape[1])
        mixed = (lam * z_j + (1 - lam) * z_k).detach()
        return (rows.z.float().unsqueeze(1) * mixed).sum(2), real

    @staticmethod
    def reference(settings: LabelDistanceSettings, batch: ReferenceBatch) -> Value:
        valid = batch.complete(*settings.taps)
        z = torch.cat([batch.outputs[tap][valid] for tap in settings.taps])
        y = torch.cat([batch.meta[settings.label][valid]] * len(settings.taps)).double()
        n = len(z)
        # The same uniform numbers as in `forward`.
        lams = np.sort(uniforms(key(batch.seed, "mixed negatives", batch.step), n, 9), 1)[:, 1]
        columns = max(1, 2 * settings.mixed_positives)
        drawn = uniforms(key(batch.seed, "mixed positives", batch.step), n, columns)
        by_label = sorted(range(n), key=lambda j: (float(y[j]), j))
        losses = []
        for i in range(n):
            others = [j for j in range(n) if j != i]
            keys, labels = [z[j] for j in others], [y[j] for j in others]
            positives = [j for j, label in enumerate(labels) if label == y[i]]
            if settings.mixed_negatives:
                lam = float(lams[i])
                for j in others:
                    if y[j] != y[i]:
                        keys.append((lam * z[i] + (1 - lam) * z[j]).detach())
                        labels.append(lam * y[i] + (1 - lam) * y[j])
            below = [j for j in by_label if y[i] - settings.window <= y[j] < y[i]]
            above = [j for j in by_label if y[i] < y[j] <= y[i] + settings.window]
            for m in range(settings.mixed_positives if below and above else 0):
                j = below[int(drawn[i, 2 * m] * np.float32(len(below)))]
                k = above[int(drawn[i, 2 * m + 1] * np.float32(len(above)))]
                lam = float((y[k] - y[i]) / (y[k] - y[j]))
                positives.append(len(keys))
                keys.append((lam * z[j] + (1 - lam) * z[k]).detach())
                labels.append(y[i])
            if positives:
                logits = batch.scale * torch.stack(keys) @ z[i]
                weights = 1 + settings.distance * (torch.stack(labels) - y[i]).abs()
                lse = (logits + weights.log()).logsumexp(0)
                losses.append(lse - logits[positives].mean())
        return torch.stack(losses).mean(), None


@dataclass(frozen=True)
class Rows:
    """This rank's rows of all taps.

    Attributes:
        z: Vectors, floating [n, D].
        y: Labels, float32 [n].
        keys: All ranks' rows, as constants.
        indices: Global row indices, int64 [n].
    """

    z: Tensor
    y: Tensor
    keys: KeySource
    indices: Tensor

    def uniforms(self, rng_key: int, columns: int) -> Tensor:
        """Return uniform float32 [n, columns] in [0, 1), which depend on the global row indices."""
        uniform = torch.from_numpy(uniforms(rng_key, self.keys.total, columns))
        return uniform[self.indices.cpu()].to(self.z.device)


def _row_indices(sizes: Sequence[int], device: torch.device, ctx: Context) -> Tensor:
    """Return the global index of each of this rank's rows. Rows are ordered by tap, then rank."""
    indices, first = [], 0
    for size in sizes:
        indices.append(first + global_row_indices(size, device, ctx.group))
        first += int(all_sum(torch.tensor(size, device=device), ctx.group))
    return torch.cat(indices)


def _draw_positions(labels: Tensor, low: Tensor, high: Tensor, above: bool, u: Tensor) -> Tensor:
    """Draw m positions per row in the sorted labels whose label is in [low, high), or in
    (low, high] if `above`. `u` [n, m] are uniform numbers in [0, 1). -1 if no label is in range."""
    first, last = (torch.searchsorted(labels, y, right=above) for y in (low, high))
    count = last - first
    at = torch.minimum((u * count).long(), count - 1)
    return torch.where(count > 0, first + at, -1)


def _logsumexp(parts: Tensor) -> Tensor:
    """Log-sum-exp over dimension 0, [p, n] -> [n]; where all parts are -inf, the result is -inf
    with zero gradient."""
    finite = (parts > -torch.inf).any(0)
    return torch.where(finite, torch.where(finite, parts, 0).logsumexp(0), -torch.inf)
