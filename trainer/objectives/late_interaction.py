"""Token-wise late interaction (FILIP, Yao et al. 2022; with one direction only, ColBERT, Khattab
and Zaharia 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels import late_interaction_loss
from gigabatch.trainer.fields import Pair
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, ValidPairs, over_widths, valid_pairs
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import ScaledSettings, WidthsSettings
from gigabatch.trainer.taps import parse_tap


class LateInteractionSettings(ScaledSettings, WidthsSettings):
    name: Literal["late_interaction"]
    """Token by token: each token of one side is scored by its best match on the other (FILIP)."""
    taps: Pair = ("image.tokens", "text.tokens")
    """The two tower outputs to compare; both must hold tokens."""
    symmetric: bool = True
    """true: both directions, each averaged over the tokens of its query (FILIP). false: only the
    first tap is the query (ColBERT)."""


@register
class LateInteraction(Scaled[LateInteractionSettings]):
    Settings = LateInteractionSettings
    card = Card(
        "FILIP's token-wise late interaction; with one direction only, ColBERT",
        "FILIP, Yao et al. 2022; ColBERT, Khattab and Zaharia 2020",
        "InfoNCE over s_ij = mean_{t in q_i} max_{u in k_j} <q_it, k_ju>; the other direction "
        "takes the mean over the key's tokens. Padding does not count",
        "3 Tq Tk per direction, at the token width",
        "retrieval by fine details: several objects in an image, long documents. It costs much "
        "more than one vector per item",
        ("filip", "colbert", "maxsim", "late"),
    )
    examples = {
        "filip": Example(),
        "colbert": Example({"taps": ["text.tokens", "image.tokens"], "symmetric": False}),
        "widths": Example({"widths": [3, 6]}),
    }
    benchmarks = {"": Benchmark(share=1 / 16)}  # 16 tokens per item

    def __init__(self, settings: LateInteractionSettings) -> None:
        super().__init__(settings)
        self.needs = Needs(settings.taps)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        tokens = math.prod(outputs[tap].shape[1] for tap in self.settings.taps)
        return 3 * (1 + self.settings.symmetric) * tokens

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        pairs = valid_pairs(outputs, meta, settings.taps, settings)
        q, k = pairs.vectors
        mask_q, mask_k = (_token_mask(pairs, meta, tap) for tap in settings.taps)
        value = late_interaction_loss(
            q, k, scale, mask_q=mask_q, mask_k=mask_k, symmetric=settings.symmetric,
            group=ctx.group, gather_mode=settings.gather_mode, backend=settings.backend,
        )  # fmt: skip
        return Loss(value, {"logit_scale": scale.detach()})

    @staticmethod
    def reference(settings: LateInteractionSettings, batch: ReferenceBatch) -> Value:
        sides = []
        for tap in settings.taps:
            rows = batch.outputs[tap]
            all_real = torch.ones(rows.shape[:2], dtype=torch.bool)
            sides.append((rows, batch.meta["text_mask"] if tap.startswith("text") else all_real))
        directions = [sides, sides[::-1]][: 1 + settings.symmetric]
        losses = []
        for (q, mask_q), (k, mask_k) in directions:
            products = torch.einsum("itd,jud->ijtu", q, k)
            best = products.masked_fill(~mask_k[None, :, None], -torch.inf).amax(3)
            scores = (best * mask_q[:, None]).sum(2) / mask_q.sum(1)[:, None]
            losses.append(F.cross_entropy(batch.scale * scores, torch.arange(len(q))))
        return torch.stack(losses).mean(), None


def _token_mask(pairs: ValidPairs, meta: Mapping[str, Tensor], tap: str) -> Tensor | None:
    """Return bool [n, T], true for real tokens; None if all are real."""
    mask = meta.get(f"{parse_tap(tap).modality}_mask")
    return None if mask is None else mask[pairs.valid]
