"""Similarity functions of a query and a key, computed one tile at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gigabatch.kernels.sources import KeyBlock, accumulator_dtype


class Score(ABC):
    """A similarity function s_ij of M queries and the keys of a block.

    Methods receive blocks of the operands' rows and some keys, both in at least float32.

    Attributes:
        operands: The query side: differentiable tensors [M, ...], the queries first.
        needs_scratch: Whether `pull` reads what `tile` left in `scratch`.
    """

    operands: tuple[Tensor, ...]
    needs_scratch = True

    def tile_shape(self, rows: int, columns: int, keys: KeyBlock) -> tuple[int, int]:
        """Return the (queries, keys) of a tile that needs about rows x columns numbers."""
        return rows, columns

    def scratch(self, r: int, c: int, keys: KeyBlock) -> Any:
        """Allocate work space for tiles of up to [r, c]."""
        dtype, device = accumulator_dtype(keys.keys.dtype), keys.keys.device
        return torch.empty(r * c, dtype=dtype, device=device)

    @abstractmethod
    def tile(self, rows: Sequence[Tensor], keys: KeyBlock, out: Tensor, scratch: Any) -> None:
        """Write the scores to `out` [r, c]."""

    @abstractmethod
    def pull(
        self, rows: Sequence[Tensor], keys: KeyBlock, scores: Tensor, scratch: Any,
        drows: Sequence[Tensor], dk: Tensor | None, grad: Tensor,
    ) -> None:  # fmt: skip
        """Add the gradients of a tile's operands and keys; called after `tile`.

        Args:
            rows: Blocks [r, ...] of the operands.
            keys: c keys.
            scores: [r, c] from `tile`.
            scratch: As `tile` left it.
            drows: Gradients [r, ...] of the operands, added to.
            dk: Gradient [c, ...] of the keys, added to; None if the keys are constants.
            grad: [r, c] gradient of the scores; may be overwritten.
        """

    @abstractmethod
    def dense(self, rows: Sequence[Tensor], keys: KeyBlock) -> Tensor:
        """Compute the scores [r, c] by their definition, differentiably; `tile` must agree."""

    @abstractmethod
    def pairs(self, keys: KeyBlock) -> Tensor:
        """Compute the scores [M] of query i with key i, differentiably."""


class Dot(Score):
    """Dot product s_ij = <q_i, k_j>; the cosine if both sides are normalized.

    Args:
        q: [M, D] queries; the keys are [N, D].
    """

    needs_scratch = False

    def __init__(self, q: Tensor) -> None:
        self.operands = (q,)

    def tile(self, rows: Sequence[Tensor], keys: KeyBlock, out: Tensor, scratch: Any) -> None:
        torch.mm(rows[0], keys.keys.T, out=out)

    def pull(
        self, rows: Sequence[Tensor], keys: KeyBlock, scores: Tensor, scratch: Any,
        drows: Sequence[Tensor], dk: Tensor | None, grad: Tensor,
    ) -> None:  # fmt: skip
        drows[0].addmm_(grad, keys.keys)
        if dk is not None:
            dk.addmm_(grad.T, rows[0])

    def dense(self, rows: Sequence[Tensor], keys: KeyBlock) -> Tensor:
        return rows[0] @ keys.keys.T

    def pairs(self, keys: KeyBlock) -> Tensor:
        dtype = accumulator_dtype(keys.keys.dtype)
        return (self.operands[0].to(dtype) * keys.keys.to(dtype)).sum(1)


class GatedCosine(Score):
    """Cosine of vectors gated by the query, <g_i q_i, g_i k_j> / (|g_i q_i| |g_i k_j|) (Hydra).

    Computed as two matrix products: with a_i = g_i^2 q_i / |g_i q_i|,

        s_ij = <a_i, k_j> / sqrt(<g_i^2, k_j^2>).

    A pair whose gated length is 0 scores 0.

    Args:
        q: [M, D] queries; the keys are [N, D].
        gate: [M, D] gates of the queries.
    """

    def __init__(self, q: Tensor, gate: Tensor) -> None:
        gate = gate.to(accumulator_dtype(q.dtype))
        # Only a gate's direction matters; with a maximum of 1 its squares do not underflow.
        tiny = torch.finfo(gate.dtype).tiny
        gate = gate / gate.detach().abs().amax(1, keepdim=True).clamp(min=tiny)
        gated = gate * q
        length = gated.square().sum(1, keepdim=True).clamp(min=tiny).sqrt()
        self.operands = (gate * gated / length, gate.square())

    def tile(self, rows: Sequence[Tensor], keys: KeyBlock, out: Tensor, scratch: Any) -> None:
        inverse = scratch[: out.numel()].view(out.shape)
        torch.mm(rows[1], keys.keys.square().T, out=inverse)
        torch.mm(rows[0], keys.keys.T, out=out).mul_(_inverse_root(inverse, inverse))

    def pull(
        self, rows: Sequence[Tensor], keys: KeyBlock, scores: Tensor, scratch: Any,
        drows: Sequence[Tensor], dk: Tensor | None, grad: Tensor,
    ) -> None:  # fmt: skip
        inverse = scratch[: grad.numel()].view(grad.shape)
        # With A = <a, k>, B = <g^2, k^2>: dA = G B^-1/2 and dB = -G s B^-1 / 2.
        grad_a = grad.mul_(inverse)
        drows[0].addmm_(grad_a, keys.keys)
        if dk is not None:
            dk.addmm_(grad_a.T, rows[0])
        grad_b = grad_a.mul_(inverse).mul_(scores).mul_(-0.5)
        drows[1].addmm_(grad_b, keys.keys.square())
        if dk is not None:
            dk.addcmul_(keys.keys, grad_b.T @ rows[1], value=2)

    def dense(self, rows: Sequence[Tensor], keys: KeyBlock) -> Tensor:
        return rows[0] @ keys.keys.T * _inverse_root(rows[1] @ keys.keys.square().T)

    def pairs(self, keys: KeyBlock) -> Tensor:
        a, squared = self.operands
        k = keys.keys.to(a.dtype)
        return (a * k).sum(1) * _inverse_root((squared * k.square()).sum(1))


def _inverse_root(value: Tensor, out: Tensor | None = None) -> Tensor:
    """Return value^-1/2, and 0 where the value is not above the smallest normal number."""
    is_zero = value <= torch.finfo(value.dtype).tiny
    if out is None:
        return torch.where(is_zero, torch.inf, value).rsqrt()
    return torch.rsqrt(value, out=out).masked_fill_(is_zero, 0)
