"""SwAV (Caron et al. 2020), as an addition to CLIP (number 40): one view's assignment to prototypes
is predicted from the other. Assignments of the global batch are balanced, so that all prototypes
are used alike: without that, one would take everything.

Prototypes are learnt, or they are the batch's own vectors of another tap, of all ranks, as number
40 takes them: an image's views agree on what texts it lies among.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.kernels import gather_rows
from gigabatch.trainer.config import SwAVSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.blocks import mean_metric, paired, weighted_mean


class SwAV(Objective):
    about = About(
        "SwAV: predict one view's balanced assignment to prototypes from the other",
        "SwAV, Caron et al. 2020; as an addition to CLIP, whose other modality's batch stands for "
        "the prototypes, 40",
        "mean_i - sum_k Q_b(i, k) log softmax_k(<a_i, c_k> / temperature), both ways, halved; Q by "
        "Sinkhorn of exp(<b_i, c_k> / epsilon) over the global batch, without gradient",
        "6 K / N for K prototypes; of three taps 6",
        "clusters without labels; an addition, in a sum: CLIP with it has weight 0.2 there",
    )

    def __init__(self, settings: SwAVSettings, group: str | None, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.needs = Needs(settings.taps)
        if len(settings.taps) == 2:
            learnt = F.normalize(torch.randn(settings.prototypes, width), dim=1)
            self.prototypes = nn.Parameter(learnt)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        if len(self.settings.taps) == 3:
            return 6
        return 6 * self.settings.prototypes / len(outputs[self.settings.taps[0]])

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        settings, vectors = self.settings, paired(outputs, meta, self.settings.taps).vectors
        given = gather_rows(vectors[2], ctx.group) if len(vectors) == 3 else self.prototypes
        prototypes = F.normalize(given, dim=1)
        scores = [each @ prototypes.T for each in vectors[:2]]
        found = [balanced(s, settings.epsilon, settings.iterations, ctx) for s in scores]
        each = sum(
            -(assigned * (s / settings.temperature).log_softmax(1)).sum(1)
            for s, assigned in zip(scores, reversed(found), strict=True)
        )
        assert isinstance(each, Tensor)
        value = weighted_mean(each / 2, torch.ones_like(each), ctx)
        return Loss(value, {"confidence": mean_metric(found[0].amax(1), ctx)})


@torch.no_grad()
def balanced(scores: Tensor, epsilon: float, iterations: int, ctx: Context) -> Tensor:
    """[n, K]: Sinkhorn's assignments of this rank's rows. Over all ranks' rows each prototype is
    given as much as any other, up to the last step, which lets each row give 1 in all. Kept as
    logarithms: a small epsilon overflows nothing."""
    logs = scores / epsilon
    for _ in range(iterations):
        of_all = gather_rows(logs.logsumexp(0)[None], ctx.group).logsumexp(0)
        logs = logs - of_all - math.log(logs.shape[1])
        logs = logs - logs.logsumexp(1, keepdim=True)
    return logs.exp()
