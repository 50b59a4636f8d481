"""SwAV (Caron et al. 2020), as an addition to CLIP (number 40): one view's assignment to prototypes
is predicted from the other. Assignments of the global batch are balanced, so that all prototypes
are used alike: without that, one would take everything.

Prototypes are learnt, or they are the batch's own vectors of another tap, of all ranks, as number
40 takes them: an image's views agree on what texts it lies among.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gigabatch.kernels import gather_rows
from gigabatch.trainer.config import SwAVSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.common import mean_metric, paired, weighted_mean

Group = dist.ProcessGroup | None


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
        if not len(given):  # no sample of the batch has all three taps
            nothing = torch.stack([v.sum() for v in vectors]).sum()
            return Loss(nothing, {"confidence": nothing.detach()})
        each, surest = _SwappedPrediction.apply(
            *vectors[:2], F.normalize(given, dim=1), settings, ctx.group
        )
        value = weighted_mean(each, torch.ones_like(each), ctx)
        return Loss(value, {"confidence": mean_metric(surest, ctx)})


class _SwappedPrediction(torch.autograd.Function):
    """([n], [n]): each row's cross-entropies of predictions with the other view's assignments, the
    mean of both ways, and the largest share that its first view is assigned.

    Two matrices [n, K] are kept for the backward pass, the gradients of the scores, and two more
    are held on the way there; plain operations would hold a dozen. What is done to each number is
    done to some rows at a time, which a processor's cache holds.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, prototypes: Tensor, settings: SwAVSettings, group: Group
    ) -> tuple[Tensor, Tensor]:
        scores = [rows @ prototypes.T for rows in (a, b)]
        found = [balanced(s, settings.epsilon, settings.iterations, group) for s in scores]
        surest = found[0].amax(1)
        each = [
            _to_gradient(s, assigned, settings.temperature)
            for s, assigned in zip(scores, reversed(found), strict=True)
        ]
        ctx.save_for_backward(a, b, prototypes, *scores)
        ctx.mark_non_differentiable(surest)
        return (each[0] + each[1]) / 2, surest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        a, b, prototypes, *gradients = ctx.saved_tensors
        weights = grad[:, None] / 2
        drows = [(g @ prototypes).mul_(weights) for g in gradients]
        dprototypes = None
        if ctx.needs_input_grad[2]:
            of_views = zip(gradients, (a, b), strict=True)
            dprototypes = sum(g.T @ (rows * weights) for g, rows in of_views)
        return *drows, dprototypes, None, None


def _to_gradient(scores: Tensor, assigned: Tensor, temperature: float) -> Tensor:
    """[n]: the cross-entropy of softmax(scores / temperature) with what is assigned, whose rows sum
    to 1. In place of the scores is left its gradient."""
    found = []
    for s, q in zip(_parts(scores), _parts(assigned), strict=True):
        logs = (s / temperature).log_softmax(1)
        found.append(-(q * logs).sum(1))
        torch.exp(logs, out=s).sub_(q).mul_(1 / temperature)
    return torch.cat(found)


@torch.no_grad()
def balanced(scores: Tensor, epsilon: float, iterations: int, group: Group) -> Tensor:
    """[n, K]: Sinkhorn's assignments of this rank's rows, of scores within [-1, 1]. Over all ranks'
    rows each prototype is given as much as any other, up to the last step, which lets each row
    give 1 in all.

    They are exp(scores / epsilon) times a factor of each row and one of each column, and a step is
    two products of the matrix with a vector. With the rows' maxima and the largest column's factor
    taken out, no factor or sum is below exp(-2 / epsilon) / K or above N exp(2 / epsilon): float32
    holds that down to 0.03, float64 to 0.003.
    """
    kernel = torch.empty_like(scores, dtype=None if epsilon >= 0.03 else torch.float64)
    given = kernel.new_zeros(kernel.shape[1])
    for s, k in zip(_parts(scores), _parts(kernel), strict=True):
        highest = s.amax(1, keepdim=True)
        k.copy_(s).sub_(highest).mul_(1 / epsilon).exp_()
        given += ((highest[:, 0].to(k.dtype) - 1) / epsilon).exp() @ k
    for left in reversed(range(iterations)):
        of_all = gather_rows(given[None], group).sum(0)
        of_column = of_all.min() / of_all
        given = torch.zeros_like(given)
        for k in _parts(kernel):
            of_row = 1 / (k @ of_column)
            if left:
                given += of_row @ k
            else:
                k.mul_(of_column).mul_(of_row[:, None])
    return kernel.to(scores.dtype)


def _parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of some rows each: on a CPU a MiB of float32, which its cache holds; elsewhere 256, for
    each costs a launch."""
    numbers = 2**18 if matrix.device.type == "cpu" else 2**26
    return matrix.split(max(1, numbers // max(1, matrix.shape[1])))
