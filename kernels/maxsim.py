"""MaxSim: token-wise late interaction (ColBERT, FILIP) without a matrix of all token products.

For a query of Tq tokens and a key of Tk tokens

    s_ij = 1/|q_i| sum_{t in q_i} max_{u in k_j} <q_it, k_ju>,

over real tokens only, on both sides. The other direction, the mean over the key's tokens of the
maximum over the query's, is a different score: swap the sides. The gradient flows through the first
maximum only. The backward pass finds it again, since storing it would take M x N x Tq.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigabatch.kernels.scores import Score
from gigabatch.kernels.sources import KeyBlock, accumulator_dtype, no_autocast
from gigabatch.kernels.stats import load_backend
from gigabatch.kernels.tiled import tiles

TOKENS = "tokens"  # metadata column of the keys: bool [n, Tk], true for a real token


class MaxSim(Score):
    """MaxSim score. Keys are [N, Tk, D], with `token_keys` as metadata.

    Padding may hold any value.

    Args:
        q: [M, Tq, D] token vectors of the queries.
        mask: bool [M, Tq], true for real tokens; None if all are real.

    Raises:
        TypeError: if the mask is not bool.
        ValueError: if a shape is wrong or a query has no token.
    """

    def __init__(self, q: Tensor, mask: Tensor | None = None) -> None:
        real = _check_tokens("q", q, mask)
        self.tokens = q.shape[1]
        # Set the query's padding to 0, so that it scores 0 with every key.
        inverse_count = 1 / real.sum(1).to(accumulator_dtype(q.dtype))
        self.operands = (torch.where(real.unsqueeze(2), q, 0), inverse_count)

    def tile_shape(self, rows: int, columns: int, keys: KeyBlock) -> tuple[int, int]:
        return max(1, rows // self.tokens), max(1, columns // keys.keys.shape[1])

    def scratch(self, r: int, c: int, keys: KeyBlock) -> Any:
        return super().scratch(r * self.tokens, c * keys.keys.shape[1], keys)

    def tile(self, rows: Sequence[Tensor], keys: KeyBlock, out: Tensor, scratch: Any) -> None:
        q, k = rows[0].flatten(0, 1), _without_padding(keys).flatten(0, 1)
        products = scratch[: len(k) * len(q)].view(len(keys.keys), -1, len(q))
        torch.mm(k, q.T, out=products.view(len(k), len(q)))
        products.masked_fill_(~keys.metadata[TOKENS].unsqueeze(2), -torch.inf)
        torch.sum(products.amax(1).unflatten(1, (-1, self.tokens)), 2, out=out.T)
        out.mul_(rows[1].unsqueeze(1))

    def pull(
        self, rows: Sequence[Tensor], keys: KeyBlock, scores: Tensor, scratch: Any,
        drows: Sequence[Tensor], dk: Tensor | None, grad: Tensor,
    ) -> None:  # fmt: skip
        q, k = rows[0].flatten(0, 1), _without_padding(keys).flatten(0, 1)
        products = scratch[: len(k) * len(q)].view(len(keys.keys), -1, len(q))
        first = products.max(1, keepdim=True).indices  # argmax takes three times as long
        token_grad = (grad * rows[1].unsqueeze(1)).T.repeat_interleave(self.tokens, 1).unsqueeze(1)
        if dk is not None:
            one_hot = products.zero_().scatter_(1, first, token_grad)
            dk.view(k.shape).addmm_(one_hot.view(len(k), -1), q)
        starts = torch.arange(0, len(k), products.shape[1], device=k.device).unsqueeze(1)
        chosen, weights = ((first.squeeze(1) + starts).T, token_grad.squeeze(1).T)
        drows[0].view(q.shape).add_(
            F.embedding_bag(chosen.contiguous(), k, per_sample_weights=weights.contiguous(),
                            mode="sum")
        )  # fmt: skip

    def dense(self, rows: Sequence[Tensor], keys: KeyBlock) -> Tensor:
        products = torch.einsum("rtd,cud->rtcu", rows[0], _without_padding(keys))
        best = products.masked_fill(~keys.metadata[TOKENS], -torch.inf).max(3).values
        return best.sum(1) * rows[1].unsqueeze(1)

    def pairs(self, keys: KeyBlock) -> Tensor:
        q, weight = self.operands
        with no_autocast(q):
            products = q.to(weight.dtype) @ _without_padding(keys).to(weight.dtype).mT
        real = keys.metadata[TOKENS].unsqueeze(1)
        return products.masked_fill(~real, -torch.inf).max(2).values.sum(1) * weight


def maxsim(
    q: Tensor, k: Tensor, mask_q: Tensor | None = None, mask_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Compute the MaxSim scores of all queries with all keys; differentiable once.

    Use it for a few candidates per query, or for search; a loss over many keys
    (`late_interaction_loss`) needs no such matrix. At most one tile of token products is held.

    Args:
        q: [M, Tq, D] token vectors of the queries.
        k: [N, Tk, D] token vectors of the keys.
        mask_q: bool [M, Tq], true for real tokens; None if all are real.
        mask_k: bool [N, Tk], likewise.
        backend: As in `lse_stats`.

    Returns:
        [M, N], at least float32.

    Raises:
        TypeError: if a mask is not bool.
        ValueError: if shapes do not match or an item has no token.
    """
    block = KeyBlock(k, token_keys(k, mask_k), 0)
    score = load_backend(backend, k).specialize(MaxSim(q, mask_q), block)
    q_operand = score.operands[0]
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must share a width; got {q.shape[2]} and {k.shape[2]}")
    scores: Tensor = _Matrix.apply(score, block, q_operand, k)  # type: ignore[no-untyped-call]
    return scores


class _Matrix(torch.autograd.Function):
    """The matrix of scores, as a differentiable function of both sides' tokens."""

    @staticmethod
    def forward(ctx: Any, score: MaxSim, block: KeyBlock, q: Tensor, k: Tensor) -> Tensor:
        ctx.score, ctx.block = score, block
        ctx.save_for_backward(q, k)
        out = torch.empty(len(q), len(k), dtype=accumulator_dtype(k.dtype), device=k.device)
        with no_autocast(k):
            for tile in tiles(score, block):
                out[tile.rows, tile.columns] = tile.scores
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k = ctx.saved_tensors
        dq, dk = (
            torch.zeros(t.shape, dtype=accumulator_dtype(t.dtype), device=t.device) for t in (q, k)
        )
        with no_autocast(k):
            for tile in tiles(ctx.score, ctx.block, [dq], dk):
                tile.pull(grad[tile.rows, tile.columns].contiguous())
        return None, None, dq.to(q.dtype), dk.to(k.dtype)


def token_keys(k: Tensor, mask: Tensor | None, **metadata: Tensor) -> Mapping[str, Tensor]:
    """Return the metadata of token keys: their mask and other columns.

    Args:
        k: [n, Tk, D] token vectors of the keys.
        mask: bool [n, Tk], true for real tokens; None if all are real.
        **metadata: Other columns [n, ...].

    Raises:
        TypeError: if the mask is not bool.
        ValueError: if a shape is wrong or a key has no token.
    """
    return {**metadata, TOKENS: _check_tokens("k", k, mask)}


def _check_tokens(name: str, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Check tokens and their mask. Returns the mask, all true if it is None."""
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


def _without_padding(keys: KeyBlock) -> Tensor:
    """Return the keys with 0 in place of padding, which may hold NaN."""
    return torch.where(keys.metadata[TOKENS].unsqueeze(2), keys.keys, 0)
