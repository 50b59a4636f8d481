"""The engine's sums by brute force: dense matrices, one formula each, gradients by autograd.

It shares no code with the engine. Everything is computed in the dtype of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class World:
    """Random rows and keys with the metadata of every kind of rule."""

    m: int
    n: int
    d: int
    seed: int
    dtype: torch.dtype = torch.float64
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        unit = torch.nn.functional.normalize
        m, n, d = self.m, self.n, self.d
        columns = {
            "q": unit(normal(m, d), dim=1), "k": unit(normal(n, d), dim=1),
            "gate": torch.sigmoid(2 * normal(m, d)),
            "row_scale": normal(m).exp(), "key_scale": normal(n).exp(),
            "row_bias": normal(m), "key_bias": normal(n), "shift": normal(m),
            "row_label": normal(m), "key_label": normal(n), "factor": torch.rand(m, generator=g),
            "row_teacher": unit(normal(m, 3), dim=1), "key_teacher": unit(normal(n, 3), dim=1),
            "threshold": 0.4 * normal(m), "table": normal(3, 2),
        }  # fmt: skip
        columns["table"][0, 1] = -torch.inf
        wide = torch.promote_types(self.dtype, torch.float32)
        self.tensors = {
            name: t.to(self.dtype if name in ("q", "k") else wide) for name, t in columns.items()
        }
        self.row_id, self.key_id = (torch.randint(0, 4, (size,), generator=g) for size in (m, n))
        self.row_role = torch.randint(0, 3, (m,), generator=g)
        self.key_role = torch.randint(0, 2, (n,), generator=g)

    def metadata(self) -> dict[str, Tensor]:
        return {
            "id": self.key_id, "role": self.key_role, "index": torch.arange(self.n),
            "label": self.tensors["key_label"], "teacher": self.tensors["key_teacher"],
        }  # fmt: skip


def dot(q: Tensor, k: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) @ k.to(wide).T


def gated(q: Tensor, gate: Tensor, k: Tensor) -> Tensor:
    """Compute gated cosines with a tensor [M, N, D], as Hydra's code does."""
    wide = torch.promote_types(q.dtype, torch.float32)
    left = (gate * q.to(wide)).unsqueeze(1)
    right = gate.unsqueeze(1) * k.to(wide).unsqueeze(0)
    return torch.nn.functional.cosine_similarity(left, right, dim=2, eps=0)


def late(q: Tensor, real_q: Tensor, k: Tensor, real_k: Tensor) -> Tensor:
    """Compute MaxSim for one pair of items at a time, on real tokens only."""
    rows = [
        torch.stack([(q[i][real_q[i]] @ k[j][real_k[j]].T).amax(1).mean() for j in range(len(k))])
        for i in range(len(q))
    ]
    return torch.stack(rows)


MASKS: dict[str, Callable[[World, Tensor], Tensor]] = {
    "eq": lambda w, s: w.row_id[:, None] == w.key_id[None, :],
    "ne": lambda w, s: w.row_id[:, None] != w.key_id[None, :],
    "not self": lambda w, s: torch.arange(w.m)[:, None] != torch.arange(w.n)[None, :],
    "either": lambda w, s: (
        (w.row_id[:, None] != w.key_id[None, :])
        | (torch.arange(w.m)[:, None] == torch.arange(w.n)[None, :])
    ),
    "teacher": lambda w, s: w.tensors["row_teacher"] @ w.tensors["key_teacher"].T <= 0.5,
    "at least": lambda w, s: s.detach() >= w.tensors["threshold"][:, None],
}
WEIGHTS: dict[str, Callable[[World], Tensor]] = {
    "table": lambda w: w.tensors["table"][w.row_role][:, w.key_role],
    "own table": lambda w: torch.where(
        MASKS["eq"](w, torch.empty(0)), w.tensors["table"][w.row_role][:, w.key_role], 0
    ),
    "distance": lambda w: (
        (w.tensors["row_label"][:, None] - w.tensors["key_label"][None, :]).abs() + 1
    ).log(),
    "mixed distance": lambda w: (
        w.tensors["factor"][:, None]
        * (w.tensors["row_label"][:, None] - w.tensors["key_label"][None, :]).abs()
        + 1
    ).log(),
    "soft": lambda w: 2 * (w.tensors["row_teacher"] @ w.tensors["key_teacher"].T),
}


def combine_rule(world: World, rule: Sequence[str], scores: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(scores, dtype=torch.bool)
    weights = torch.zeros_like(scores)
    for name in rule:
        if name in MASKS:
            mask = mask & MASKS[name](world, scores)
        else:
            weights = weights + WEIGHTS[name](world)
    return mask, weights


def lse(logits: Tensor, axis: int) -> Tensor:
    """Compute logsumexp with gradient 0 instead of NaN where everything is masked."""
    empty = (logits == -torch.inf).all(axis, keepdim=True)
    z = torch.where(empty, 0, logits).logsumexp(axis)
    return torch.where(empty.squeeze(axis), -torch.inf, z)
