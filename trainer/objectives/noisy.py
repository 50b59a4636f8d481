"""InfoNCE for noisy pairs (PC2; NCR, Huang et al. 2021), with dual encoders. Samples are split by
their losses, which are smaller for clean pairs, because networks learn regular patterns first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gigabatch.kernels import Eq, Lse, Ne, key_source, lse_stats
from gigabatch.kernels.loss_terms import cross_entropy, hinge_hardest, hinge_mean
from gigabatch.trainer.fields import Count, Pair
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs, Updates
from gigabatch.trainer.objectives.common import (
    Scaled,
    count_same,
    mean_metric,
    valid_pairs,
    weighted_mean,
)
from gigabatch.trainer.objectives.gmm import clean_probability, fit_split
from gigabatch.trainer.objectives.reference import (
    Benchmark,
    Example,
    ReferenceBatch,
    Value,
    negative_log_softmax,
)
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import CachedSettings, ScaledSettings
from gigabatch.trainer.objectives.tables import SampleTable


class NoisySettings(ScaledSettings, CachedSettings):
    name: Literal["noisy"]
    """InfoNCE for noisy pairs: once per epoch a mixture of two Gaussians splits the samples'
    losses, and each pair is weighted by its probability of being clean."""
    taps: Pair = ("image", "text")
    """The two tower outputs to compare."""
    warmup_epochs: Count = 1
    """Epochs before the first split, in which all pairs have the same weight."""
    head: Literal["softmax", "hinge"] = "softmax"
    """softmax: InfoNCE weighted by cleanness. hinge: hinge loss against the hardest negative (until
    the first split, the mean over all negatives); less clean pairs have a smaller margin."""
    margin: float = Field(0.2, gt=0)
    """hinge: the margin of a clean pair."""
    curve: float = Field(10.0, gt=1)
    """hinge: a pair that is clean with probability w gets (curve^w - 1) / (curve - 1) of the
    margin."""


@register
class Noisy(Scaled[NoisySettings]):
    Settings = NoisySettings
    card = Card(
        "Noise-robust InfoNCE: each pair is weighted by its probability of being clean",
        "PC2; NCR, Huang et al. 2021; the split: DivideMix, Li et al. 2020",
        "sum_i w_i CE_i / sum_i w_i, w_i = P(clean | the loss of i an epoch ago) by a mixture of "
        "two Gaussians; or the hardest-negative hinge, margin_i = margin (curve^w_i - 1) / "
        "(curve - 1)",
        "4 (softmax); 2 (hinge; 8 until the first split)",
        "captions from the web, many of which do not match their image",
        ("ncr", "pc2", "noise_robust"),
    )
    examples = {
        "": Example(),
        "hinge": Example({"head": "hinge"}, missing=True),
        "warmup": Example({"warmup_epochs": 2}),
    }
    benchmarks = {"": Benchmark()}

    def __init__(self, settings: NoisySettings) -> None:
        super().__init__(settings)
        # A sample's loss when it was last seen; NaN before.
        self.needs = Needs(settings.taps, tables={"loss": (torch.nan,)})
        # Mean, variance and share of each component. A variance of 0 means that there is no split.
        self.register_buffer("split", torch.zeros(2, 3))

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 4 if self.settings.head == "softmax" else 2 if self._is_split else 8

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        pairs = valid_pairs(outputs, meta, settings.taps, settings)
        q, k = pairs.vectors
        ids, clean = pairs.columns["sample"], self._clean(meta["loss"][pairs.valid, 0])
        if settings.head == "hinge":
            losses = self._hinge(q, k, ids, clean, ctx)
            value = weighted_mean(losses, torch.ones_like(losses), ctx)
        else:
            losses = self._cross_entropy(q, k, scale, ids, ctx)
            value = weighted_mean(losses, clean, ctx)

        def updates() -> Updates:
            table = meta["loss"].clone()
            table[pairs.valid, 0] = losses.detach()
            return {"loss": table}

        return Loss(
            value, {"logit_scale": scale.detach(), "clean": mean_metric(clean, ctx)}, updates
        )

    def on_epoch(self, tables: Mapping[str, SampleTable], ctx: Context) -> Updates:
        if ctx.epoch < self.settings.warmup_epochs:
            return {}
        table = tables["loss"]
        losses = table.shard[:, 0]
        return {"split": fit_split(losses[~losses.isnan()], table.world).float()}

    def sample_values(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = tables["loss"][:, 0]
        if not self._is_split:
            return {"loss": losses}
        clean = torch.where(losses.isnan(), torch.nan, self._clean(losses))
        return {"loss": losses, "clean_probability": clean}

    @property
    def _is_split(self) -> bool:
        return bool((self.get_buffer("split")[:, 1] > 0).all())

    def _clean(self, losses: Tensor) -> Tensor:
        """Return probabilities [n] of being clean; 1 for new samples and before the first split."""
        if not self._is_split:
            return torch.ones_like(losses)
        probability = clean_probability(losses, self.get_buffer("split"))
        return torch.where(losses.isnan(), 1, probability)

    def _cross_entropy(
        self, q: Tensor, k: Tensor, scale: Tensor, ids: Tensor, ctx: Context
    ) -> Tensor:
        """Return [n]: the cross-entropy of each pair, averaged over both directions."""
        keys = key_source(k, {"id": ids}, ctx.group, self.settings.gather_mode)
        stats = lse_stats(
            q, keys, [Lse("rows", scale), Lse("columns", scale)], Eq(ids, "id"),
            self.settings.backend, 2**20 * self.settings.cache_mib,
        )  # fmt: skip
        directions = zip(stats.z, stats.positive, stats.weight, strict=True)
        return torch.stack([cross_entropy(*terms) for terms in directions]).mean(0)

    def _hinge(self, q: Tensor, k: Tensor, ids: Tensor, clean: Tensor, ctx: Context) -> Tensor:
        """Return [n]: the hinge loss of each pair, averaged over both directions."""
        settings, backend = self.settings, self.settings.backend
        margin = settings.margin * (settings.curve**clean - 1) / (settings.curve - 1)
        positive, negatives = (q.float() * k.float()).sum(1), (Ne(ids, "id"),)
        same, total = count_same(ids, ctx)
        losses = torch.zeros_like(positive)
        for rows, targets in ((q, k), (k, q)):
            keys = key_source(targets, {"id": ids}, ctx.group, settings.gather_mode)
            if self._is_split:
                loss = hinge_hardest(rows, keys, negatives, positive, margin, backend)
            else:
                loss = hinge_mean(rows, keys, negatives, positive, margin, total - same, backend)
            losses = losses + loss
        return losses / 2

    @staticmethod
    def reference(settings: NoisySettings, batch: ReferenceBatch) -> Value:
        valid, memory = batch.complete(*settings.taps), batch.memory
        ids = batch.meta["sample"][valid]
        samples = ids.tolist()
        clean = torch.ones(len(samples), dtype=torch.float64)
        if batch.step > settings.warmup_epochs:
            # In a reference each step is an epoch; the split is fitted to all earlier losses.
            means, variances, shares = _two_gaussians(list(memory.values()))
            for i, sample in enumerate(samples):
                if sample in memory:
                    x = min(max(memory[sample], float(means[0])), float(means[1]))
                    density = torch.exp(-((x - means) ** 2) / (2 * variances)) / variances**0.5
                    clean[i] = (shares * density)[0] / (shares * density).sum()
        image, text = (batch.outputs[tap][valid] for tap in settings.taps)
        scores, same = image @ text.T, ids[:, None] == ids[None]
        if settings.head == "hinge":
            margin = settings.margin * (settings.curve**clean - 1) / (settings.curve - 1)
            directions = []
            for s in (scores, scores.T):
                over = torch.relu(margin[:, None] + s - s.diagonal()[:, None]).masked_fill(same, 0)
                split = batch.step > settings.warmup_epochs
                directions.append(over.amax(1) if split else over.sum(1) / (~same).sum(1))
            losses = (directions[0] + directions[1]) / 2
            value = losses.mean()
        else:
            logits = batch.scale * scores
            losses = negative_log_softmax(logits, same) + negative_log_softmax(logits.T, same)
            losses = losses / 2
            value = (clean * losses).sum() / clean.sum()
        memory |= zip(samples, losses.detach().float().tolist(), strict=True)
        return value, None


def _two_gaussians(values: list[float]) -> tuple[Any, Any, Any]:
    """Fit two Gaussians by plain expectation maximization, for the reference. Returns means,
    variances and shares, [2] each."""
    x = torch.tensor(values, dtype=torch.float64)
    deviation = x.std(correction=0)
    means = torch.stack([x.mean() - deviation, x.mean() + deviation])
    variances = deviation**2 * torch.ones(2)
    shares = torch.full((2,), 0.5, dtype=torch.float64)
    for _ in range(5000):
        distance = (x[:, None] - means) ** 2
        density = shares * torch.exp(-distance / (2 * variances)) / variances**0.5
        p = density / density.sum(1, keepdim=True)
        shares = p.mean(0)
        previous, means = means, (p * x[:, None]).sum(0) / p.sum(0)
        variances = ((p * (x[:, None] - means) ** 2).sum(0) / p.sum(0)).clamp(
            min=1e-3 * deviation**2
        )
        if torch.equal(previous, means):
            break
    order = means.argsort()
    return means[order], variances[order], shares[order]
