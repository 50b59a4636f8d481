"""Tower kinds `vector`, `set` and `sequence`: encoders of numeric vectors.

All norms are LayerNorm, whose statistics are per sample, so a sample's embedding does not depend
on its micro-batch. Padding does not change the real vectors of a set.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from gigabatch.data.decode.vectors import VectorSettings, VectorsSettings
from gigabatch.trainer.fields import Amount, Count, Fraction
from gigabatch.trainer.towers.base import Encoded, TowerInput, TowerKind, tower_kind

Numbers = float | tuple[float, ...]
"""One number for all coordinates, or one per coordinate."""


class StandardizedSettings(VectorSettings):
    """Keys of a vector that is standardized: (x - mean) / std."""

    mean: Numbers = 0.0
    """Number subtracted from each coordinate of a vector, or a list of `size` numbers."""
    std: Annotated[float, Field(gt=0)] | tuple[Annotated[float, Field(gt=0)], ...] = 1.0
    """Number that divides each coordinate of a vector after `mean` is subtracted, or a list of
    `size` numbers."""

    @model_validator(mode="after")
    def _one_number_per_coordinate(self) -> Self:
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if isinstance(numbers, tuple) and len(numbers) != self.size:
                raise ValueError(f"{name}: {len(numbers)} numbers for a vector of size {self.size}")
        return self


@tower_kind("more")
class VectorTower(TowerKind, StandardizedSettings):
    """A residual multi-layer perceptron over one vector per sample."""

    kind: Literal["vector"]
    """Kind of extra tower; vector: one numeric vector per sample, such as a row of a table,
    through a residual multi-layer perceptron."""
    width: Count = 128
    """Width of the perceptron."""
    layers: Amount = 2
    """Residual blocks of the perceptron; 0 is a linear map."""
    dropout: Fraction = 0.0
    """Dropout rate in the perceptron's blocks while training."""

    def build(self, data: TowerInput) -> nn.Module:
        return VectorEncoder(self.size, self.width, self.layers, self.dropout, self.mean, self.std)


@tower_kind("more")
class VectorsTower(TowerKind, StandardizedSettings, VectorsSettings):
    """A small transformer over several vectors per sample."""

    kind: Literal["set", "sequence"]
    """Kind of extra tower; set: several numeric vectors per sample, through a small transformer.
    sequence: the same, with positions."""
    width: Count = 128
    """Width of the transformer."""
    layers: Amount = 1
    """Transformer blocks; 0 pools the vectors without attention between them."""
    heads: Count = 4
    """Attention heads of each transformer block."""
    pool: Literal["mean", "attention"] = "mean"
    """Pooling of a sample's vectors. mean: their mean. attention: a mean with learned weights."""
    dropout: Fraction = 0.0
    """Dropout rate in the transformer blocks while training."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.layers and self.width % self.heads:
            raise ValueError(f"width ({self.width}) is not a multiple of heads ({self.heads})")
        return self

    def build(self, data: TowerInput) -> nn.Module:
        return VectorsEncoder(
            self.size, self.length, self.width, self.layers, self.heads, self.kind == "sequence",
            self.pool == "attention", self.dropout, self.mean, self.std,
        )  # fmt: skip


class VectorEncoder(nn.Module):
    """Encode float32 [B, size] to [B, width]: standardize, then residual blocks."""

    def __init__(
        self, size: int, width: int, layers: int, dropout: float, mean: Numbers, std: Numbers
    ) -> None:
        super().__init__()
        self.standardize = Standardize(mean, std)
        self.linear = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Perceptron(width, 2, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.width = width

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.linear(self.standardize(vectors))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


class VectorsEncoder(nn.Module):
    """Encode float32 [B, L, size] with a mask bool [B, L] to [B, width].

    Transformer blocks run over the real vectors, in a sequence with positions; the result is their
    mean, or a mean with learned weights. The tokens are [B, L, token_width]. A row without real
    vectors counts as one zero vector, so that it has an embedding.
    """

    def __init__(
        self, size: int, length: int, width: int, layers: int, heads: int, ordered: bool,
        attend: bool, dropout: float, mean: Numbers, std: Numbers,
    ) -> None:  # fmt: skip
        super().__init__()
        self.standardize = Standardize(mean, std)
        self.linear = nn.Linear(size, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.1) if ordered else None
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.weigh = nn.Linear(width, 1, bias=False) if attend else None
        self.width = self.token_width = width

    def forward(self, vectors: Tensor, mask: Tensor, tokens: bool = False) -> Encoded:
        # A softmax over an empty row is NaN, and a zero gradient times NaN is still NaN.
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = mask | (first & ~mask.any(1, keepdim=True))
        x = self.linear(self.standardize(vectors))
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


class Standardize(nn.Module):
    """Compute (x - mean) / std along the last axis; both come from the config, not a checkpoint."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Numbers, std: Numbers) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Perceptron(nn.Module):
    """A residual block of two linear layers, `factor` times wider between them."""

    def __init__(self, width: int, factor: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, factor * width), nn.Linear(factor * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.dropout(self.outer(F.gelu(self.inner(self.norm(x)))))
        return x + update


class _Block(nn.Module):
    """A pre-norm transformer block: self-attention and a perceptron, with residuals."""

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
        values = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.dropout(self.merge(values.transpose(1, 2).flatten(2)))
        out: Tensor = self.perceptron(x)
        return out
