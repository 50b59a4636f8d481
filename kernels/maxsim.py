"""MaxSim, token-wise late interaction (ColBERT; FILIP, number 25), without its token matrix.

For a query of Tq tokens and a key of Tk tokens

    s_ij = 1/|q_i| sum_{t in q_i} max_{u in k_j} <q_it, k_ju>,

over real tokens only, on both sides. The other direction, the mean over the key's tokens of the
maximum over the query's, is another score: swap the sides. The gradient flows through one maximum
alone, the first, which the backward pass finds again (storing it would take M x N x Tq).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigabatch.kernels.scores import Score
from gigabatch.kernels.sources import Panel, full_precision, wide
from gigabatch.kernels.stats import engine_of
from gigabatch.kernels.tiled import tiles

TOKENS = "tokens"  # the keys' metadata column: bool [n, Tk], true for a real token


class MaxSim(Score):
    """q [M, Tq, D], `mask` bool [M, Tq] (None: all tokens are real); keys [N, Tk, D] with
    `token_keys` as metadata. Pads may hold anything. Raises TypeError or ValueError for a mask
    that does not fit and for a query without a token."""

    def __init__(self, q: Tensor, mask: Tensor | None = None) -> None:
        real = _check_tokens("q", q, mask)
        self.tokens = q.shape[1]
        # The query's pads become 0 and score 0 with everything.
        self.operands = (torch.where(real.unsqueeze(2), q, 0), 1 / real.sum(1).to(wide(q.dtype)))

    def tile_shape(self, rows: int, columns: int, keys: Panel) -> tuple[int, int]:
        return max(1, rows // self.tokens), max(1, columns // keys.keys.shape[1])

    def scratch(self, r: int, c: int, keys: Panel) -> Any:
        return super().scratch(r * self.tokens, c * keys.keys.shape[1], keys)

    def tile(self, rows: Sequence[Tensor], keys: Panel, out: Tensor, scratch: Any) -> None:
        q, k = rows[0].flatten(0, 1), _real(keys).flatten(0, 1)
        products = scratch[: len(k) * len(q)].view(len(keys.keys), -1, len(q))
        torch.mm(k, q.T, out=products.view(len(k), len(q)))
        products.masked_fill_(~keys.metadata[TOKENS].unsqueeze(2), -torch.inf)
        torch.sum(products.amax(1).unflatten(1, (-1, self.tokens)), 2, out=out.T)
        out.mul_(rows[1].unsqueeze(1))

    def pull(
        self, rows: Sequence[Tensor], keys: Panel, scores: Tensor, scratch: Any,
        drows: Sequence[Tensor], dk: Tensor | None, grad: Tensor,
    ) -> None:  # fmt: skip
        q, k = rows[0].flatten(0, 1), _real(keys).flatten(0, 1)
        products = scratch[: len(k) * len(q)].view(len(keys.keys), -1, len(q))
        first = products.max(1, keepdim=True).indices  # argmax takes three times as long
        each = (grad * rows[1].unsqueeze(1)).T.repeat_interleave(self.tokens, 1).unsqueeze(1)
        if dk is not None:
            dk.view(k.shape).addmm_(products.zero_().scatter_(1, first, each).view(len(k), -1), q)
        starts = torch.arange(0, len(k), products.shape[1], device=k.device).unsqueeze(1)
        chosen, weights = ((first.squeeze(1) + starts).T, each.squeeze(1).T)
        drows[0].view(q.shape).add_(
            F.embedding_bag(chosen.contiguous(), k, per_sample_weights=weights.contiguous(),
                            mode="sum")
        )  # fmt: skip

    def dense(self, rows: Sequence[Tensor], keys: Panel) -> Tensor:
        products = torch.einsum("rtd,cud->rtcu", rows[0], _real(keys))
        best = products.masked_fill(~keys.metadata[TOKENS], -torch.inf).max(3).values
        return best.sum(1) * rows[1].unsqueeze(1)

    def pairs(self, keys: Panel) -> Tensor:
        q, weight = self.operands
        with full_precision(q):
            products = q.to(weight.dtype) @ _real(keys).to(weight.dtype).mT
        real = keys.metadata[TOKENS].unsqueeze(1)
        return products.masked_fill(~real, -torch.inf).max(2).values.sum(1) * weight


def maxsim(
    q: Tensor, k: Tensor, mask_q: Tensor | None = None, mask_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The scores [M, N] of all queries with all keys, at least float32; differentiable once.

    q [M, Tq, D], k [N, Tk, D]; masks bool [M, Tq], [N, Tk], None: all tokens are real. For a few
    candidates a query, or search; a loss over many (`late_interaction_loss`) needs no such matrix.
    Nothing larger than a tile of token products is held. `backend`: see `lse_stats`. Raises
    TypeError or ValueError for inputs that do not fit and for an item without a token.
    """
    panel = Panel(k, token_keys(k, mask_k), 0)
    score = engine_of(backend, k).fit(MaxSim(q, mask_q), panel)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must share a width; got {q.shape[2]} and {k.shape[2]}")
    return _Matrix.apply(score, panel, score.operands[0], k)


class _Matrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score: MaxSim, panel: Panel, q: Tensor, k: Tensor) -> Tensor:
        ctx.score, ctx.panel = score, panel
        ctx.save_for_backward(q, k)
        out = torch.empty(len(q), len(k), dtype=wide(k.dtype), device=k.device)
        with full_precision(k):
            for tile in tiles(score, panel):
                out[tile.rows, tile.columns] = tile.scores
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k = ctx.saved_tensors
        dq, dk = (torch.zeros(t.shape, dtype=wide(t.dtype), device=t.device) for t in (q, k))
        with full_precision(k):
            for tile in tiles(ctx.score, ctx.panel, [dq], dk):
                tile.pull(grad[tile.rows, tile.columns].contiguous())
        return None, None, dq.to(q.dtype), dk.to(k.dtype)


def token_keys(k: Tensor, mask: Tensor | None, **metadata: Tensor) -> Mapping[str, Tensor]:
    """Metadata of token keys [n, Tk, D]: their mask, checked, and other columns."""
    return {**metadata, TOKENS: _check_tokens("k", k, mask)}


def _check_tokens(name: str, tokens: Tensor, mask: Tensor | None) -> Tensor:
    if tokens.ndim != 3:
        raise ValueError(f"{name} must be [n, tokens, D]; got {tuple(tokens.shape)}")
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask_{name} must be bool; got {mask.dtype}")
    if mask.shape != tokens.shape[:2] or mask.device != tokens.device:
        raise ValueError(f"mask_{name} must be {list(tokens.shape[:2])} on {tokens.device}; got "
                         f"{list(mask.shape)} on {mask.device}")  # fmt: skip
    if not mask.any(1).all():
        raise ValueError(f"mask_{name}: row {int((~mask.any(1)).nonzero()[0])} has no token")
    return mask


def _real(keys: Panel) -> Tensor:
    return torch.where(keys.metadata[TOKENS].unsqueeze(2), keys.keys, 0)
