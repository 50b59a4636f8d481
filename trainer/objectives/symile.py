"""Contrast of three modalities or more at once (Symile, Saporta et al. 2024, number 34): the score
of a tuple is the multilinear product sum_d a_d b_d c_d ..., so that what only all of them together
tell is learnt too."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
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
from gigabatch.trainer.config import SymileSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, paired, weighted_mean


class Symile(Scaled):
    about = About(
        "Symile: three modalities or more, with what only all of them together tell",
        "Symile, Saporta et al. 2024, 34",
        "mean over taps a, mean_i [log sum_j exp(scale <a_i, b_j * c_j>) - scale <a_i, b_i * c_i>];"
        " keys of the batch's own tuples (paired), of shuffled ones, or of all combinations",
        "4 M for M taps; all: 4 M N^(M - 2)",
        "image, text and audio; clinical or sensor data, where pairs alone do not tell enough",
    )

    def __init__(self, settings: SymileSettings, group: str | None, width: int) -> None:
        super().__init__(settings)
        self.settings = settings
        self.needs = Needs(settings.taps)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        n, m = len(outputs[self.settings.taps[0]]), len(self.settings.taps)
        return 4 * m * (n ** (m - 2) if self.settings.keys == "all" else 1)

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale = self.scale()
        vectors = paired(outputs, meta, self.settings.taps, self.settings).vectors
        numbers = global_row_indices(len(vectors[0]), vectors[0].device, ctx.group)
        whole = [] if self.settings.keys == "paired" else [
            gather_rows(each, ctx.group) for each in vectors
        ]  # fmt: skip
        losses = []
        for anchor, mine in enumerate(vectors):
            if self.settings.keys == "paired":
                others = [v.float() for i, v in enumerate(vectors) if i != anchor]
                each = self._paired(mine, math.prod(others[1:], start=others[0]), numbers, ctx)
            else:
                factors = [v for i, v in enumerate(whole) if i != anchor]
                each = self._made(mine, factors, numbers, key(ctx.seed, "symile", ctx.step, anchor))
            losses.append(weighted_mean(each, torch.ones_like(each), ctx))
        return Loss(torch.stack(losses).mean(), {"logit_scale": scale.detach()})

    def _paired(self, mine: Tensor, product: Tensor, numbers: Tensor, ctx: Context) -> Tensor:
        """Only the product travels."""
        keys = key_source(
            product.to(mine.dtype), {"number": numbers}, ctx.group, self.settings.gather_mode
        )
        stats = lse_stats(
            mine, keys, [Lse("rows", self.scale())], Eq(numbers, "number"), self.settings.backend,
            2**20 * self.settings.cache_mib,
        )  # fmt: skip
        return cross_entropy(stats.z[0], stats.positive[0], stats.weight[0])

    def _made(self, mine: Tensor, factors: list[Tensor], numbers: Tensor, stream: int) -> Tensor:
        """Products of other rows' vectors. A row's own tuple stands in the place of its own key;
        one that a shuffle happens to make again does not count twice."""
        scale, n = self.scale(), len(factors[0])
        own = [factor[numbers].float() for factor in factors]
        positive = scale * (mine.float() * math.prod(own[1:], start=own[0])).sum(1)
        if self.settings.keys == "all":
            pairings, rule = all_pairings(n, len(factors)), [Ne(numbers, "tuple")]
        else:
            shuffles = [
                torch.from_numpy(permute(np.arange(n), n, key(stream, i))).to(mine.device)
                for i in range(len(factors))
            ]
            pairings, rule = [shuffles], [Ne(numbers, "index"), Ne(numbers, "tuple")]
        lse = Lse("rows", scale, None, rule)
        (z,) = lse_stats(mine, Products(factors, pairings), [lse], backend=self.settings.backend).z
        return torch.logaddexp(z, positive) - positive
