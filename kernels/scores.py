"""Scores: how a query and a key make a number. The engine asks a score for one tile at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gigabatch.kernels.sources import Panel, wide


class Score(ABC):
    """`operands`: the row side, differentiable tensors [M, ...], the queries first. Methods get
    blocks of them, and some keys, both in at least float32."""

    operands: tuple[Tensor, ...]
    needs_scratch = True  # `pull` relies on what `tile` left there

    def tile_shape(self, rows: int, columns: int, keys: Panel) -> tuple[int, int]:
        """(queries, keys) of a tile that shall hold about rows x columns numbers."""
        return rows, columns

    def scratch(self, r: int, c: int, keys: Panel) -> Any:
        """Work space for tiles of up to [r, c], if it is needed."""
        return torch.empty(r * c, dtype=wide(keys.keys.dtype), device=keys.keys.device)

    @abstractmethod
    def tile(self, rows: Sequence[Tensor], keys: Panel, out: Tensor, scratch: Any) -> None:
        """Write the scores [r, c]."""

    @abstractmethod
    def pull(
        self, rows: Sequence[Tensor], keys: Panel, scores: Tensor, scratch: Any,
        drows: Sequence[Tensor], dk: Tensor | None, grad: Tensor,
    ) -> None:  # fmt: skip
        """After `tile`: from the gradient of its scores, add to those of the blocks and, where it
        is given, `dk` of the keys. May overwrite `grad`."""

    @abstractmethod
    def dense(self, rows: Sequence[Tensor], keys: Panel) -> Tensor:
        """The scores [r, c] by their definition, differentiable: what tiles must equal."""

    @abstractmethod
    def pairs(self, keys: Panel) -> Tensor:
        """[M]: the score of each query with the key of the same number, differentiable."""


class Dot(Score):
    """s_ij = <q_i, k_j>; the cosine if both are normalised. q [M, D], keys [N, D]."""

    needs_scratch = False

    def __init__(self, q: Tensor) -> None:
        self.operands = (q,)

    def tile(self, rows: Sequence[Tensor], keys: Panel, out: Tensor, scratch: Any) -> None:
        torch.mm(rows[0], keys.keys.T, out=out)

    def pull(
        self, rows: Sequence[Tensor], keys: Panel, scores: Tensor, scratch: Any,
        drows: Sequence[Tensor], dk: Tensor | None, grad: Tensor,
    ) -> None:  # fmt: skip
        drows[0].addmm_(grad, keys.keys)
        if dk is not None:
            dk.addmm_(grad.T, rows[0])

    def dense(self, rows: Sequence[Tensor], keys: Panel) -> Tensor:
        return rows[0] @ keys.keys.T

    def pairs(self, keys: Panel) -> Tensor:
        kind = wide(keys.keys.dtype)
        return (self.operands[0].to(kind) * keys.keys.to(kind)).sum(1)


class GatedCosine(Score):
    """Cosine of vectors gated by the query, <g_i q_i, g_i k_j> / (|g_i q_i| |g_i k_j|) (Hydra,
    number 3), as two products: with a_i = g_i^2 q_i / |g_i q_i|,

        s_ij = <a_i, k_j> / sqrt(<g_i^2, k_j^2>).

    q, gate: [M, D]; keys [N, D]. What a gate blots out scores 0.
    """

    def __init__(self, q: Tensor, gate: Tensor) -> None:
        gate = gate.to(wide(q.dtype))
        # Only a gate's direction matters: at length 1 its squares do not underflow.
        tiny = torch.finfo(gate.dtype).tiny
        gate = gate / gate.detach().abs().amax(1, keepdim=True).clamp(min=tiny)
        gated = gate * q
        length = gated.square().sum(1, keepdim=True).clamp(min=tiny).sqrt()
        self.operands = (gate * gated / length, gate.square())

    def tile(self, rows: Sequence[Tensor], keys: Panel, out: Tensor, scratch: Any) -> None:
        inverse = scratch[: out.numel()].view(out.shape)
        torch.mm(rows[1], keys.keys.square().T, out=inverse)
        torch.mm(rows[0], keys.keys.T, out=out).mul_(_inverse_root(inverse, inverse))

    def pull(
        self, rows: Sequence[Tensor], keys: Panel, scores: Tensor, scratch: Any,
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

    def dense(self, rows: Sequence[Tensor], keys: Panel) -> Tensor:
        return rows[0] @ keys.keys.T * _inverse_root(rows[1] @ keys.keys.square().T)

    def pairs(self, keys: Panel) -> Tensor:
        a, squared = self.operands
        k = keys.keys.to(a.dtype)
        return (a * k).sum(1) * _inverse_root((squared * k.square()).sum(1))


def _inverse_root(value: Tensor, out: Tensor | None = None) -> Tensor:
    """value^-1/2, and 0 for nothing."""
    nothing = value <= torch.finfo(value.dtype).tiny
    if out is None:
        return torch.where(nothing, torch.inf, value).rsqrt()
    return torch.rsqrt(value, out=out).masked_fill_(nothing, 0)
