"""Dense contrastive loss in plain torch, which the engine must equal.

It shares no code with the engine, not even with its `reference` back end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from gigabatch.kernels import contrastive_loss


@dataclass(frozen=True)
class Case:
    """Inputs of one loss, as `contrastive_loss` takes them."""

    q: Tensor
    k: Tensor
    scale: Tensor
    ids_q: Tensor | None = None
    ids_k: Tensor | None = None
    symmetric: bool = True
    same_id: Literal["positive", "exclude"] = "positive"
    label_smoothing: float = 0.0
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        """Convert embeddings to `dtype`, and the scale and the bias to at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return replace(
            self, q=self.q.to(dtype), k=self.k.to(dtype), scale=self.scale.to(wide), bias=bias
        )


@dataclass(frozen=True)
class Result:
    """A loss and its gradients. `dbias` has length 0 if there is no bias."""

    value: Tensor
    dq: Tensor
    dk: Tensor
    dscale: Tensor
    dbias: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.tensors())

    def equal(self, other: Result) -> bool:
        return all(map(torch.equal, self.tensors(), other.tensors()))


def make_case(
    m: int, n: int, d: int, scale: float = 10.0, ids: int | None = 6, seed: int = 0,
    symmetric: bool = True, same_id: Literal["positive", "exclude"] = "positive",
    label_smoothing: float = 0.0, biased: bool = False,
) -> Case:  # fmt: skip
    """Make rows of unit length, float64. `ids`: number of different ids; None: no ids."""
    g = torch.Generator().manual_seed(seed)
    q, k = (
        torch.nn.functional.normalize(torch.randn(rows, d, generator=g, dtype=torch.float64), dim=1)
        for rows in (m, n)
    )
    temperature = torch.tensor(scale, dtype=torch.float64)
    bias = torch.randn(n, generator=g, dtype=torch.float64) if biased else None
    case = Case(q, k, temperature, None, None, symmetric, same_id, label_smoothing, bias)
    if ids is None:
        return case
    ids_q, ids_k = (torch.randint(0, ids, (rows,), generator=g) * 2**40 for rows in (m, n))
    return replace(case, ids_q=ids_q, ids_k=ids_k)


def positives(case: Case) -> Tensor:
    """Return bool [M, N]."""
    if case.same_id == "exclude":
        return torch.eye(len(case.q), dtype=torch.bool)
    return equal_ids(case)


def equal_ids(case: Case) -> Tensor:
    ids_q = torch.arange(len(case.q)) if case.ids_q is None else case.ids_q
    ids_k = ids_q if case.ids_k is None else case.ids_k
    return ids_q[:, None] == ids_k[None, :]


def dense_loss(case: Case) -> Tensor:
    logits = case.scale * (case.q @ case.k.T)
    mask = positives(case)
    allowed = ~equal_ids(case) | mask if case.same_id == "exclude" else torch.ones_like(mask)
    biased = logits if case.bias is None else logits + case.bias
    rows = one_way(biased, mask, allowed, case.label_smoothing)
    if not case.symmetric:
        return rows
    return (rows + one_way(logits.T, mask.T, allowed.T, case.label_smoothing)) / 2


def one_way(logits: Tensor, mask: Tensor, allowed: Tensor, smoothing: float) -> Tensor:
    count = mask.sum(1)
    target = torch.where(mask, logits, 0).sum(1) / count.clamp(min=1)
    uniform = torch.where(allowed, logits, 0).sum(1) / allowed.sum(1).clamp(min=1)
    z = logits.masked_fill(~allowed, -torch.inf).logsumexp(1)
    per_row = z - (1 - smoothing) * target - smoothing * uniform
    return per_row[count > 0].sum() / (count > 0).sum().clamp(min=1)


def differentiate(case: Case, backend: str | None = None, dense: bool = False) -> Result:
    """Differentiate the engine's loss or, with `dense`, plain torch's in the same dtypes."""

    def engine(c: Case) -> Tensor:
        arguments = {field.name: getattr(c, field.name) for field in fields(c)}
        return contrastive_loss(**arguments, backend=backend)

    return differentiate_with(dense_loss if dense else engine, case)


def differentiate_with(loss: Callable[[Case], Tensor], case: Case) -> Result:
    q, k, scale = (t.detach().clone().requires_grad_() for t in (case.q, case.k, case.scale))
    bias = None if case.bias is None else case.bias.detach().clone().requires_grad_()
    value = loss(replace(case, q=q, k=k, scale=scale, bias=bias))
    inputs = [t for t in (q, k, scale, bias) if t is not None]
    grads = list(torch.autograd.grad(value, inputs))
    return Result(value.detach(), *grads, *([] if bias is not None else [scale.new_zeros(0)]))


def assert_as_exact_as_torch(
    case: Case, result: Result, loss: Callable[[Case], Tensor] = dense_loss
) -> None:
    """Assert that errors against float64 are at most twice those of plain torch in the same dtype.

    Plain torch may be exact by chance, so a floor is allowed: a few rounding errors of the logits,
    in at least float32, and one rounding of each result to its dtype. Label smoothing is added
    outside the tiles: it sums two gradients that were each rounded to the inputs' dtype, which
    shows where they cancel.
    """
    exact, baseline = (differentiate_with(loss, c) for c in (case.to(torch.float64), case))
    dtype = torch.promote_types(case.q.dtype, torch.float32)
    size = float((case.scale * (case.q.double() @ case.k.double().T)).abs().max())
    size += 0 if case.bias is None else float(case.bias.abs().max())
    rounding = 16 * torch.finfo(dtype).eps * (1 + size)
    length = float(max(case.q.double().norm(dim=1).max(), case.k.double().norm(dim=1).max()))
    slope = float(case.scale) * length / max(1, min(len(case.q), len(case.k))) ** 0.5
    floors = {
        "value": 1.0 + float(exact.value.abs()),
        "dq": slope,
        "dk": slope,
        "dscale": length**2,
        "dbias": 1.0,
    }
    for name, floor in floors.items():
        expected, value, torch_value = (getattr(r, name) for r in (exact, result, baseline))
        assert value.dtype == (dtype if name == "value" else torch_value.dtype)
        error, allowed = ((t.double() - expected).norm() for t in (value, torch_value))
        rows = max(len(case.q), len(case.k)) ** 0.5
        smoothed = case.label_smoothing * float(case.scale) * length * rows * (name in ("dq", "dk"))
        storage_error = torch.finfo(value.dtype).eps * (expected.norm() + smoothed)
        assert error <= 2 * allowed + rounding * floor + storage_error, (name, error, allowed)
