"""Problems that the benchmarks measure: named uses of the engine, and plain torch.

A problem is a function of a batch of n rows of width d; a step runs forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch import kernels as K
from gigabatch.kernels import loss_terms
from gigabatch.kernels.bench.implementations import Inputs, dense, dense_sigmoid, one_matrix
from gigabatch.kernels.sources import KeySource

Step = Callable[[], Tensor]
TOKENS_Q, TOKENS_K = 64, 32


class Batch:
    """Unit vectors and the metadata of n rows and keys."""

    def __init__(self, n: int, d: int) -> None:
        g = torch.Generator().manual_seed(n)
        self.n, self.index = n, torch.arange(n)
        self.q, self.k = (
            F.normalize(torch.randn(n, d, generator=g), dim=1).requires_grad_() for _ in range(2)
        )
        self.scale = torch.tensor(20.0, requires_grad=True)
        self.one = torch.tensor(1.0)
        self.ids = torch.randint(0, n // 2 + 1, (n,), generator=g)
        self.role = self.index % 3
        self.label = torch.rand(n, generator=g)
        self.teacher = F.normalize(torch.randn(n, 16, generator=g), dim=1)

    def keys(self) -> KeySource:
        columns = {"id": self.ids, "index": self.index, "role": self.role, "label": self.label}
        return K.Local(self.k, {**columns, "teacher": self.teacher})

    def inputs(self) -> Inputs:
        """Return the inputs for the implementations in plain torch."""
        return Inputs(self.q, self.k, self.scale, -10 * self.one)

    def cross_entropy(self, rule: K.Rule, score: K.Score | Tensor | None = None) -> Tensor:
        """Compute the mean cross-entropy of each row's own key under a rule."""
        lse = K.Lse("rows", self.scale, None, rule)
        own_key = K.Eq(self.index, "index")
        s = K.lse_stats(self.q if score is None else score, self.keys(), [lse], own_key)
        return loss_terms.cross_entropy(s.z[0], s.positive[0], s.weight[0]).mean()


def hinge(b: Batch) -> Tensor:
    rule = (K.Ne(b.ids, "id"),)
    return loss_terms.hinge_hardest(K.Dot(b.q), b.keys(), rule, (b.q * b.k).sum(1), 0.2).mean()


def pairs(b: Batch) -> Tensor:
    keys, lse = b.keys(), K.Lse("rows", b.scale, None, (K.Ne(b.ids, "id"),))
    s = K.lse_stats(b.q, keys, [lse], K.Eq(b.ids, "id"))
    same = (K.Eq(b.ids, "id"),)
    return loss_terms.pair_wise(b.q, keys, same, b.scale, s.z[0], s.weight[0]).mean()


def soft(b: Batch) -> Tensor:
    rule = (K.SecondScore(b.teacher, "teacher", scale=9.0),)
    s = K.lse_stats(b.q, b.keys(), [K.Lse("rows", b.scale)], rule)
    return loss_terms.cross_entropy(s.z[0], s.positive[0], s.weight[0]).mean()


def queue(b: Batch) -> Tensor:
    keys = K.Concat(K.Local(b.k, {"id": b.ids}), K.Local(b.q.detach().flip(0), {"id": b.ids}))
    s = K.lse_stats(b.q, keys, [K.Lse("rows", b.scale)], K.Eq(b.ids, "id"))
    return loss_terms.cross_entropy(s.z[0], s.positive[0], s.weight[0]).mean()


def ragged(b: Batch) -> Tensor:
    group = b.index // 8
    keys, lse = K.Ragged(b.k, group, group, {"index": b.index}), K.Lse("rows", b.scale)
    s = K.lse_stats(b.q, keys, [lse], K.Eq(b.index, "index"))
    return loss_terms.cross_entropy(s.z[0], s.positive[0], s.weight[0]).mean()


def products(b: Batch) -> Tensor:
    keys = K.Products([b.k, b.q], [(0, 0), (0, 1)])
    s = K.lse_stats(b.q, keys, [K.Lse("rows", b.scale)], K.Eq(b.index, "tuple"))
    return loss_terms.cross_entropy(s.z[0], s.positive[0], s.weight[0]).mean()


def recall(b: Batch) -> Tensor:
    keys, rule = b.keys(), (K.Ne(b.index, "index"),)
    with torch.no_grad():
        best, _ = K.row_top(b.q, keys, 1, (K.Eq(b.index, "index"),))
        return K.pair_sum(b.q, keys, "step", b.one, -best[:, 0], rule=rule)


def kde(b: Batch) -> Tensor:
    return loss_terms.log_density(b.q, b.keys(), torch.tensor(0.5), b.n).mean()


def own_key_or(b: Batch, mask: K.Clause) -> K.Rule:
    return (K.Either(mask, K.Eq(b.index, "index")),)


def bias(b: Batch) -> Tensor:
    biases = (b.label, b.label)
    lses = [K.Lse(axis, b.one, x.requires_grad_()) for axis, x in zip(AXES, biases, strict=True)]
    return torch.cat(K.lse_stats(b.q, b.keys(), lses).z).mean()


def scales(b: Batch) -> Tensor:
    lses = [K.Lse(axis, 1 + b.label) for axis in AXES]
    return torch.cat(K.lse_stats(b.q, b.keys(), lses).z).mean()


AXES: tuple[K.Axis, ...] = ("rows", "columns")
PROBLEMS: dict[str, Callable[[Batch], Tensor]] = {
    "contrastive": lambda b: K.contrastive_loss(b.q, b.k, b.scale),
    "ids": lambda b: K.contrastive_loss(b.q, b.k, b.scale, ids_q=b.ids),
    "classes": lambda b: K.contrastive_loss(b.q, b.k, b.scale, ids_q=b.index % 2),
    "exclude": lambda b: K.contrastive_loss(b.q, b.k, b.scale, ids_q=b.ids, same_id="exclude"),
    "smoothing": lambda b: K.contrastive_loss(
        b.q, b.k, b.scale, ids_q=b.ids, same_id="exclude", label_smoothing=0.1, bias=b.label
    ),
    "sigmoid": lambda b: K.sigmoid_loss(b.q, b.k, b.scale, -10 * b.one),
    "bias": bias,
    "scales": scales,
    "eq": lambda b: b.cross_entropy(own_key_or(b, K.Eq(b.ids, "id"))),
    "ne": lambda b: b.cross_entropy(own_key_or(b, K.Ne(b.ids, "id"))),
    "table": lambda b: b.cross_entropy((K.Table(b.role, "role", torch.zeros(3, 3)),)),
    "distance": lambda b: b.cross_entropy((K.AbsDiff(b.label, "label", b.label),)),
    "teacher": lambda b: b.cross_entropy(own_key_or(b, K.SecondScore(b.teacher, "teacher", 0.5))),
    "at least": lambda b: b.cross_entropy(own_key_or(b, K.AtLeast(b.label / 10))),
    "soft": soft,
    "gated": lambda b: b.cross_entropy((), K.GatedCosine(b.q, torch.sigmoid(b.q.detach()))),
    "kde": kde,
    "hinge": hinge,
    "pairs": pairs,
    "queue": queue,
    "ragged": ragged,
    "products": products,
    "recall": recall,
    "dense": lambda b: dense(b.inputs()),
    "dense, one matrix": lambda b: one_matrix(b.inputs()),
    "dense sigmoid": lambda b: dense_sigmoid(b.inputs()),
}
DENSE = [name for name in PROBLEMS if "dense" in name]


def step(name: str, batch: Batch) -> float:
    """Run forward and backward of a problem; return the mean value."""
    value = PROBLEMS[name](batch)
    if value.requires_grad:
        value.backward()
    return float(value.detach().mean())


class Tokens:
    """MaxSim of n queries of 64 tokens with n keys of 32 tokens, in the engine or plain torch."""

    def __init__(self, n: int, d: int, keys: int | None = None) -> None:
        g = torch.Generator().manual_seed(n)
        self.q, self.k = (
            F.normalize(torch.randn(rows, t, d, generator=g), dim=2).requires_grad_()
            for rows, t in ((n, TOKENS_Q), (keys or n, TOKENS_K))
        )

    def step(self, dense: bool) -> float:
        if dense:
            scores = torch.einsum("itd,jud->ijtu", self.q, self.k).amax(3).mean(2)
        else:
            scores = K.maxsim(self.q, self.k)
        value = scores.logsumexp(1).mean()
        value.backward()
        return float(value.detach())
