"""SwAV (Caron et al. 2020): predict one view's assignment to prototypes from the other view.
Assignments of the global batch are balanced over prototypes, which prevents collapse.

Prototypes are parameters, or all ranks' vectors of a third tap. If that is text, an image's views
agree on the texts that are close to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gigabatch.kernels import gather_rows
from gigabatch.trainer.fields import Count, Pair, Tap
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.common import mean_metric, valid_pairs, weighted_mean
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import SingleSettings

Group = dist.ProcessGroup | None


class SwAVSettings(SingleSettings):
    name: Literal["swav"]
    """SwAV: predict one view's assignment to prototypes from the other view. Assignments are
    balanced over prototypes. Add it to another objective in a `sum`."""
    taps: Pair | tuple[Tap, Tap, Tap] = ("image", "image@1")
    """Two views; each predicts the other's assignment. With a third tap, such as text, the global
    batch's vectors of that tap are the prototypes."""
    prototypes: Count = 512
    """Number of trained prototypes; not with a third tap. Scores take 4 bytes per prototype and
    sample of a worker."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the predictions."""
    epsilon: float = Field(0.05, ge=0.003)
    """Entropy regularization of the assignments; a smaller value brings each closer to a single
    prototype. Below 0.03 they are computed in float64, in twice the time and memory."""
    iterations: Count = 3
    """Iterations of Sinkhorn's algorithm."""

    @model_validator(mode="after")
    def _check_prototypes(self) -> Self:
        if len(self.taps) == 3 and "prototypes" in self.model_fields_set:
            raise ValueError(
                f"prototypes: with three taps they are the batch's vectors of {self.taps[2]}; "
                "unset this key"
            )
        return self


@register
class SwAV(Objective[SwAVSettings]):
    Settings = SwAVSettings
    card = Card(
        "SwAV: predict one view's balanced assignment to prototypes from the other",
        "SwAV, Caron et al. 2020",
        "mean_i - sum_k Q_b(i, k) log softmax_k(<a_i, c_k> / temperature), averaged over both "
        "directions; Q by Sinkhorn of exp(<b_i, c_k> / epsilon) over the global batch, without "
        "gradient",
        "6 K / N for K prototypes; with three taps 6",
        "clusters without labels; added to another objective in a `sum`, for example to `infonce` "
        "with a weight of 0.2",
        ("clusters", "deepcluster"),
    )
    examples = {
        "": Example({"prototypes": 5}, missing=True),
        "three taps": Example({"taps": ["image", "image@1", "text"]}, missing=True),
        "two modalities": Example(
            {"prototypes": 3, "taps": ["image", "text"], "temperature": 0.3, "epsilon": 0.2,
             "iterations": 1}
        ),
    }  # fmt: skip
    benchmarks = {
        "": Benchmark({"prototypes": 4096}),
        "three taps": Benchmark({"taps": ["image", "image@1", "text"]}),
    }

    def __init__(self, settings: SwAVSettings, width: int) -> None:
        super().__init__(settings)
        self.needs = Needs(settings.taps)
        if len(settings.taps) == 2:
            initial = F.normalize(torch.randn(settings.prototypes, width), dim=1)
            self.prototypes = nn.Parameter(initial)

    @classmethod
    def build(cls, settings: SwAVSettings, *, group: str | None = None, width: int = 0) -> Self:
        return cls(settings, width)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        if len(self.settings.taps) == 3:
            return 6
        return 6 * self.settings.prototypes / len(outputs[self.settings.taps[0]])

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        settings, vectors = self.settings, valid_pairs(outputs, meta, self.settings.taps).vectors
        prototypes = gather_rows(vectors[2], ctx.group) if len(vectors) == 3 else self.prototypes
        if not len(prototypes):
            # No sample of the batch has all three taps. The loss still needs a graph on every rank.
            zero = torch.stack([rows.sum() for rows in vectors]).sum()
            return Loss(zero, {"confidence": zero.detach()})
        losses, confidence = _SwappedPrediction.apply(  # type: ignore[no-untyped-call]
            *vectors[:2], F.normalize(prototypes, dim=1), settings, ctx.group
        )
        value = weighted_mean(losses, torch.ones_like(losses), ctx)
        return Loss(value, {"confidence": mean_metric(confidence, ctx)})

    @staticmethod
    def reference(settings: SwAVSettings, batch: ReferenceBatch) -> Value:
        valid = batch.complete(*settings.taps)
        views = [batch.outputs[tap][valid] for tap in settings.taps]
        prototypes = views[2] if len(views) == 3 else batch.parameters["prototypes"]
        prototypes = prototypes / prototypes.norm(dim=1, keepdim=True)
        scores = [rows @ prototypes.T for rows in views[:2]]
        n, k = scores[0].shape
        targets = []
        for s in scores:
            q = torch.exp(s.detach().T / settings.epsilon)  # [K, N], as in the paper's code
            q = q / q.sum()
            for _ in range(settings.iterations):
                q = q / q.sum(1, keepdim=True) / k
                q = q / q.sum(0, keepdim=True) / n
            targets.append((q * n).T)
        pairs = zip(scores, reversed(targets), strict=True)
        losses = [F.cross_entropy(s / settings.temperature, target) for s, target in pairs]
        return (losses[0] + losses[1]) / 2, None


class _SwappedPrediction(torch.autograd.Function):
    """Cross-entropy [n] of each row's predictions with the other view's assignments, averaged over
    both directions; and the largest share [n] in the assignment of its first view.

    Two matrices [n, K] are kept for the backward pass, the gradients of the scores, and the forward
    pass holds two more; plain operations would hold a dozen. Elementwise work runs on parts that
    fit into a processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, prototypes: Tensor, settings: SwAVSettings, group: Group
    ) -> tuple[Tensor, Tensor]:
        scores = [rows @ prototypes.T for rows in (a, b)]
        assignments = [balanced(s, settings.epsilon, settings.iterations, group) for s in scores]
        confidence = assignments[0].amax(1)
        losses = [
            _cross_entropy_to_gradient(s, target, settings.temperature)
            for s, target in zip(scores, reversed(assignments), strict=True)
        ]
        ctx.save_for_backward(a, b, prototypes, *scores)
        ctx.mark_non_differentiable(confidence)
        return (losses[0] + losses[1]) / 2, confidence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        a, b, prototypes, *gradients = ctx.saved_tensors
        weights = grad[:, None] / 2
        drows = [(g @ prototypes).mul_(weights) for g in gradients]
        dprototypes = None
        if ctx.needs_input_grad[2]:
            views = zip(gradients, (a, b), strict=True)
            dprototypes = sum(g.T @ (rows * weights) for g, rows in views)
        return *drows, dprototypes, None, None


def _cross_entropy_to_gradient(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return [n], the cross-entropy of softmax(scores / temperature) with targets whose rows sum to
    1. Overwrites the scores with its gradient."""
    losses = []
    for s, q in zip(_parts(scores), _parts(targets), strict=True):
        logs = (s / temperature).log_softmax(1)
        losses.append(-(q * logs).sum(1))
        torch.exp(logs, out=s).sub_(q).mul_(1 / temperature)
    return torch.cat(losses)


@torch.no_grad()
def balanced(scores: Tensor, epsilon: float, iterations: int, group: Group) -> Tensor:
    """Compute Sinkhorn's assignments of this rank's rows. Collective: every rank must call it.

    Over all ranks' rows every prototype gets the same share, except that the last step makes each
    row sum to 1. The assignments are exp(scores / epsilon) times one factor per row and one per
    column, so an iteration is two products of the matrix with a vector. With the rows' maxima and
    the largest column's factor taken out, no factor or sum is below exp(-2 / epsilon) / K or above
    N exp(2 / epsilon): float32 holds that down to an epsilon of 0.03, float64 down to 0.003.

    Args:
        scores: floating [n, K], in [-1, 1].
        epsilon: Entropy regularization of the assignments.
        iterations: Number of iterations.
        group: Process group, or None for this process only.

    Returns:
        [n, K], in the dtype of the scores.
    """
    kernel = torch.empty_like(scores, dtype=None if epsilon >= 0.03 else torch.float64)
    column_sums = kernel.new_zeros(kernel.shape[1])
    for s, k in zip(_parts(scores), _parts(kernel), strict=True):
        highest = s.amax(1, keepdim=True)
        k.copy_(s).sub_(highest).mul_(1 / epsilon).exp_()
        column_sums += ((highest[:, 0].to(k.dtype) - 1) / epsilon).exp() @ k
    for remaining in reversed(range(iterations)):
        total = gather_rows(column_sums[None], group).sum(0)
        column_factors = total.min() / total
        column_sums = torch.zeros_like(column_sums)
        for k in _parts(kernel):
            row_factors = 1 / (k @ column_factors)
            if remaining:
                column_sums += row_factors @ k
            else:
                k.mul_(column_factors).mul_(row_factors[:, None])
    return kernel.to(scores.dtype)


def _parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """Split a matrix by rows: on a CPU into parts of 1 MiB of float32, which fit into a cache; on a
    GPU into parts of 256 MiB, because each part costs kernel launches."""
    elements = 2**18 if matrix.device.type == "cpu" else 2**26
    parts: tuple[Tensor, ...] = matrix.split(max(1, elements // max(1, matrix.shape[1])))
    return parts
