"""The contrastive loss as plain torch writes it, with the whole matrix: what the engine must equal.

Shares nothing with the engine, not even its `reference` back end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.kernels import contrastive_loss


@dataclass(frozen=True)
class Case:
    """Inputs of one loss. `scale` is 0-dimensional; ids may be None."""

    q: Tensor
    k: Tensor
    scale: Tensor
    ids_q: Tensor | None = None
    ids_k: Tensor | None = None
    symmetric: bool = True

    def to(self, dtype: torch.dtype) -> Case:
        """Embeddings in `dtype`, the scale in at least float32."""
        scale = self.scale.to(torch.promote_types(dtype, torch.float32))
        return Case(self.q.to(dtype), self.k.to(dtype), scale, self.ids_q, self.ids_k,
                    self.symmetric)  # fmt: skip


@dataclass(frozen=True)
class Result:
    value: Tensor
    dq: Tensor
    dk: Tensor
    dscale: Tensor

    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in (self.value, self.dq, self.dk, self.dscale))

    def equal(self, other: Result) -> bool:
        return (
            torch.equal(self.value, other.value)
            and torch.equal(self.dq, other.dq)
            and torch.equal(self.dk, other.dk)
            and torch.equal(self.dscale, other.dscale)
        )


def make_case(
    m: int, n: int, d: int, scale: float = 10.0, ids: int | None = 6, seed: int = 0,
    symmetric: bool = True,
) -> Case:  # fmt: skip
    """Rows of unit length, float64. `ids`: how many codes are drawn from; None: no codes."""
    g = torch.Generator().manual_seed(seed)
    q, k = (
        torch.nn.functional.normalize(torch.randn(rows, d, generator=g, dtype=torch.float64), dim=1)
        for rows in (m, n)
    )
    temperature = torch.tensor(scale, dtype=torch.float64)
    if ids is None:
        return Case(q, k, temperature, symmetric=symmetric)
    ids_q, ids_k = (torch.randint(0, ids, (rows,), generator=g) * 2**40 for rows in (m, n))
    return Case(q, k, temperature, ids_q, ids_k, symmetric)


def positives(case: Case) -> Tensor:
    """bool [M, N]"""
    ids_q = torch.arange(len(case.q)) if case.ids_q is None else case.ids_q
    ids_k = ids_q if case.ids_k is None else case.ids_k
    return ids_q[:, None] == ids_k[None, :]


def dense_loss(q: Tensor, k: Tensor, scale: Tensor, mask: Tensor, symmetric: bool) -> Tensor:
    scores = q @ k.T
    logits = scale * scores
    rows = one_way(logits, mask)
    return (rows + one_way(logits.T, mask.T)) / 2 if symmetric else rows


def one_way(logits: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum(1)
    positive = torch.where(mask, logits, 0).sum(1) / count.clamp(min=1)
    per_row = logits.logsumexp(1) - positive
    return per_row[count > 0].sum() / (count > 0).sum().clamp(min=1)


def differentiate(case: Case, backend: str | None = None, dense: bool = False) -> Result:
    """The loss and its gradients, by the engine or, `dense`, by plain torch in the same dtypes."""
    q, k, scale = (t.detach().clone().requires_grad_() for t in (case.q, case.k, case.scale))
    if dense:
        value = dense_loss(q, k, scale, positives(case), case.symmetric)
    else:
        value = contrastive_loss(
            q, k, scale, ids_q=case.ids_q, ids_k=case.ids_k, symmetric=case.symmetric,
            backend=backend,
        )  # fmt: skip
    grads = torch.autograd.grad(value, (q, k, scale))
    return Result(value.detach(), *grads)


def assert_as_exact_as_torch(case: Case, ours: Result) -> None:
    """Errors against float64 stay within a few times those of plain torch in the same dtype.

    Plain torch may be right by luck, so a floor is allowed: some roundings of logits as large as
    these, in float32 at least, and one rounding of each result to its dtype.
    """
    exact, plain = (differentiate(c, dense=True) for c in (case.to(torch.float64), case))
    kind = torch.promote_types(case.q.dtype, torch.float32)
    size = float((case.scale * (case.q.double() @ case.k.double().T)).abs().max())
    rounding = 16 * torch.finfo(kind).eps * (1 + size)
    length = float(max(case.q.double().norm(dim=1).max(), case.k.double().norm(dim=1).max()))
    slope = float(case.scale) * length / max(1, min(len(case.q), len(case.k))) ** 0.5
    floors = {"value": 1.0, "dq": slope, "dk": slope, "dscale": length**2}
    for name, floor in floors.items():
        truth, got, torchs = (getattr(result, name) for result in (exact, ours, plain))
        assert got.dtype == (kind if name == "value" else torchs.dtype)
        error, allowed = ((t.double() - truth).norm() for t in (got, torchs))
        stored = torch.finfo(got.dtype).eps * truth.norm()
        assert error <= 4 * allowed + rounding * floor + stored, (name, error, allowed)
