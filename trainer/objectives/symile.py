"""A contrastive loss over three or more modalities at once (Symile, Saporta et al. 2024). The score
of a tuple is the multilinear product sum_d a_d b_d c_d ..., which also captures what only all
modalities together predict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gigabatch.data.rng import key, permute
from gigabatch.kernels import (
    Eq,
    Lse,
    Ne,
    Products,
    all_pairings,
    gather_rows,
    key_source,
    lse_stats,
)
from gigabatch.kernels.loss_terms import cross_entropy
from gigabatch.kernels.sources import global_row_indices
from gigabatch.trainer.fields import Tap
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, valid_pairs, weighted_mean
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import CachedSettings, ScaledSettings

TRIPLE = ["image", "text", "image@1"]


class SymileSettings(ScaledSettings, CachedSettings):
    name: Literal["symile"]
    """Three or more taps at once, scored by the sum over coordinates of the product of all vectors.
    This also captures what no two of them show."""
    taps: tuple[Tap, ...] = Field(min_length=2, max_length=8)
    """The modalities; each is the query in turn."""
    keys: Literal["paired", "shuffled", "all"] = "paired"
    """Negatives of a tap's vectors. paired: the other samples' products of the other taps' vectors.
    shuffled: such products, with each tap shuffled separately. all: all N^(taps - 1)
    combinations."""
    init_logit_scale: float = Field(14.3, gt=0)
    """Initial logit scale; products of several unit vectors are small, so larger values help."""
    scale_max: float = Field(10_000.0, gt=0)
    """Largest logit scale in the forward pass."""

    def retrieval_score(self) -> Literal["pair", "product"]:
        return "product"


@register
class Symile(Scaled[SymileSettings]):
    Settings = SymileSettings
    card = Card(
        "Symile: three or more modalities, including what only all of them together predict",
        "Symile, Saporta et al. 2024",
        "mean over taps a, mean_i [log sum_j exp(scale <a_i, b_j * c_j>) - scale <a_i, b_i * c_i>];"
        " keys are the true tuples of the batch (paired), shuffled ones, or all combinations",
        "4 M for M taps; with keys=all 4 M N^(M - 2)",
        "image, text and audio; clinical or sensor data in which pairs are not informative enough",
        ("multilinear", "trimodal"),
    )
    examples = {
        keys: Example(
            {"taps": TRIPLE, "keys": keys, "init_logit_scale": 5.0}, missing=keys == "shuffled"
        )
        for keys in ("paired", "shuffled", "all")
    }
    benchmarks = {"": Benchmark({"taps": TRIPLE})}

    def __init__(self, settings: SymileSettings) -> None:
        super().__init__(settings)
        self.needs = Needs(settings.taps)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        n, m = len(outputs[self.settings.taps[0]]), len(self.settings.taps)
        return 4 * m * (n ** (m - 2) if self.settings.keys == "all" else 1)

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale = self.scale()
        vectors = valid_pairs(outputs, meta, self.settings.taps, self.settings).vectors
        indices = global_row_indices(len(vectors[0]), vectors[0].device, ctx.group)
        paired = self.settings.keys == "paired"
        global_vectors = [] if paired else [gather_rows(rows, ctx.group) for rows in vectors]
        losses = []
        for anchor, rows in enumerate(vectors):
            if paired:
                others = [v.float() for i, v in enumerate(vectors) if i != anchor]
                loss = self._paired(rows, math.prod(others[1:], start=others[0]), indices, ctx)
            else:
                factors = [v for i, v in enumerate(global_vectors) if i != anchor]
                rng_key = key(ctx.seed, "symile", ctx.step, anchor)
                loss = self._combined(rows, factors, indices, rng_key)
            losses.append(weighted_mean(loss, torch.ones_like(loss), ctx))
        return Loss(torch.stack(losses).mean(), {"logit_scale": scale.detach()})

    def _paired(self, rows: Tensor, product: Tensor, indices: Tensor, ctx: Context) -> Tensor:
        """Return the losses [n] against all ranks' products; only the products are exchanged."""
        keys = key_source(
            product.to(rows.dtype), {"index": indices}, ctx.group, self.settings.gather_mode
        )
        stats = lse_stats(
            rows, keys, [Lse("rows", self.scale())], Eq(indices, "index"), self.settings.backend,
            2**20 * self.settings.cache_mib,
        )  # fmt: skip
        return cross_entropy(stats.z[0], stats.positive[0], stats.weight[0])

    def _combined(
        self, rows: Tensor, factors: list[Tensor], indices: Tensor, rng_key: int
    ) -> Tensor:
        """Return the losses [n] against products of different rows' vectors.

        A row's true tuple replaces the key of the same index. It is not counted again where a
        shuffle reproduces it.
        """
        scale, n = self.scale(), len(factors[0])
        others = [factor[indices].float() for factor in factors]  # of the row's true tuple
        positive = scale * (rows.float() * math.prod(others[1:], start=others[0])).sum(1)
        if self.settings.keys == "all":
            pairings, rule = all_pairings(n, len(factors)), [Ne(indices, "tuple")]
        else:
            shuffles = [
                torch.from_numpy(permute(np.arange(n), n, key(rng_key, i))).to(rows.device)
                for i in range(len(factors))
            ]
            pairings, rule = [shuffles], [Ne(indices, "index"), Ne(indices, "tuple")]
        lse = Lse("rows", scale, None, rule)
        (z,) = lse_stats(rows, Products(factors, pairings), [lse], backend=self.settings.backend).z
        return torch.logaddexp(z, positive) - positive

    @staticmethod
    def reference(settings: SymileSettings, batch: ReferenceBatch) -> Value:
        valid = batch.complete(*settings.taps)
        vectors = [batch.outputs[tap][valid] for tap in settings.taps]
        n, losses = len(vectors[0]), []
        for anchor, rows in enumerate(vectors):
            others = vectors[:anchor] + vectors[anchor + 1 :]
            if settings.keys == "paired":
                logits = batch.scale * rows @ math.prod(others[1:], start=others[0]).T
                losses.append(F.cross_entropy(logits, torch.arange(n)))
            elif settings.keys == "all":
                logits = batch.scale * torch.einsum("id,jd,ld->ijl", rows, *others).flatten(1)
                losses.append(F.cross_entropy(logits, torch.arange(n) * (n + 1)))
            else:
                rng_key = key(batch.seed, "symile", batch.step, anchor)
                losses.append(_shuffled_reference(rows, others, batch.scale, rng_key))
        return torch.stack(losses).mean(), None


def _shuffled_reference(rows: Tensor, others: list[Tensor], scale: Tensor, rng_key: int) -> Tensor:
    """Return the mean loss against shuffled products. The permutations are those of `forward`."""
    n, losses = len(rows), []
    shuffles = [permute(np.arange(n), n, key(rng_key, i)) for i in range(len(others))]
    positive = scale * (rows * math.prod(others[1:], start=others[0])).sum(1)
    for i in range(n):
        logits = [positive[i]]
        for j in range(n):
            chosen = [int(shuffle[j]) for shuffle in shuffles]
            if j != i and set(chosen) != {i}:
                product = math.prod(o[at] for o, at in zip(others, chosen, strict=True))
                logits.append(scale * (rows[i] * product).sum())
        losses.append(torch.stack(logits).logsumexp(0) - positive[i])
    return torch.stack(losses).mean()
