"""Token-wise late interaction (FILIP, Yao et al. 2022, number 25; one way ColBERT, Khattab and
Zaharia 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from gigabatch.kernels import late_interaction_loss
from gigabatch.trainer.config import LateInteractionSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Paired, Scaled, over_widths, paired
from gigabatch.trainer.taps import parse_tap


class LateInteraction(Scaled):
    about = About(
        "FILIP's token-wise late interaction; one way, ColBERT",
        "FILIP, Yao et al. 2022, 25; ColBERT, Khattab and Zaharia 2020",
        "InfoNCE over s_ij = mean_{t in q_i} max_{u in k_j} <q_it, k_ju>, the way back with the "
        "mean over the key's own tokens, real tokens only",
        "3 (ways) Tq Tk, of the token width",
        "retrieval by details: several things in a picture, long documents. Much more costly",
    )

    def __init__(self, settings: LateInteractionSettings, group: str | None, width: int) -> None:
        super().__init__(settings)
        self.settings = settings
        self.needs = Needs(settings.taps)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        tokens = math.prod(outputs[tap].shape[1] for tap in self.settings.taps)
        return 3 * (1 + self.settings.symmetric) * tokens

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        rows = paired(outputs, meta, settings.taps, settings)
        q, k = rows.vectors
        masks = [self._mask(rows, meta, tap) for tap in settings.taps]
        value = late_interaction_loss(
            q, k, scale, mask_q=masks[0], mask_k=masks[1], symmetric=settings.symmetric,
            group=ctx.group, gather_mode=settings.gather_mode, backend=settings.backend,
            cache_bytes=2**20 * settings.cache_mib,
        )  # fmt: skip
        return Loss(value, {"logit_scale": scale.detach()})

    def _mask(self, rows: Paired, meta: Mapping[str, Tensor], tap: str) -> Tensor | None:
        """Real tokens [n, T], where the modality has others."""
        mask = meta.get(f"{parse_tap(tap).modality}_mask")
        return None if mask is None else mask[rows.here]
