"""Encoders of vectors of numbers: one a sample, or a set or sequence of them.

Norms are LayerNorm, whose statistics are per sample, so that a sample's embedding does not depend
on its micro-batch; what pads a set does not touch its real vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.trainer.config.more import Numbers
from gigabatch.trainer.towers.conv import Encoded


class VectorEncoder(nn.Module):
    """float32 [B, size] -> [B, width]: standardised, then residual blocks of two linear layers."""

    def __init__(
        self, size: int, width: int, layers: int, dropout: float, mean: Numbers, std: Numbers
    ) -> None:
        super().__init__()
        self.standardise = Standardise(mean, std)
        self.linear = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Perceptron(width, 2, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.width = width

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.linear(self.standardise(vectors))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VectorsEncoder(nn.Module):
    """float32 [B, L, size], mask bool [B, L] -> [B, width]: transformer blocks over the real
    vectors (in a sequence with positions), then their mean, or a mean of learnt weights; with
    `tokens`, the vectors too, [B, L, token_width]. A row without a real vector counts as one of
    zeros, so that it has an embedding."""

    def __init__(
        self, size: int, length: int, width: int, layers: int, heads: int, ordered: bool,
        attend: bool, dropout: float, mean: Numbers, std: Numbers,
    ) -> None:  # fmt: skip
        super().__init__()
        self.standardise = Standardise(mean, std)
        self.linear = nn.Linear(size, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.1) if ordered else None
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.weigh = nn.Linear(width, 1, bias=False) if attend else None
        self.width = self.token_width = width

    def forward(self, vectors: Tensor, mask: Tensor, tokens: bool = False) -> Encoded:
        # A softmax over nothing would be NaN, whose gradient even a factor of zero lets through.
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = mask | (first & ~mask.any(1, keepdim=True))
        x = self.linear(self.standardise(vectors))
        if self.position is not None:
            x = x + self.position
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        scores = mask.new_zeros(mask.shape, dtype=torch.float32)
        if self.weigh is not None:
            scores = self.weigh(x).squeeze(-1).float()
        weights = scores.masked_fill(~mask, -torch.inf).softmax(1).to(x.dtype)
        pooled = (weights.unsqueeze(1) @ x).squeeze(1)
        return (pooled, x) if tokens else pooled


class Standardise(nn.Module):
    """(x - mean) / std along the last axis. Not saved: the config has them."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Numbers, std: Numbers) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Perceptron(nn.Module):
    """A residual block of two linear layers, `factor` times as wide between them."""

    def __init__(self, width: int, factor: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, factor * width), nn.Linear(factor * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.outer(F.gelu(self.inner(self.norm(x)))))


class _Block(nn.Module):
    """Self-attention and a perceptron, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.perceptron = Perceptron(width, 4, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.project(self.norm(x)).chunk(3, dim=-1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.dropout(self.merge(seen.transpose(1, 2).flatten(2)))
        return self.perceptron(x)
