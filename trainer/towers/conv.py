"""Tower kind `conv`: small convolutional encoders of images and of tokens.

Both are pre-activation residual networks (He et al. 2016). Their norms use only the statistics of
one sample, so a sample's embedding does not depend on its micro-batch.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.trainer.fields import Amount, Count, Fraction
from gigabatch.trainer.towers.base import (
    Encoded,
    StageSettings,
    TowerInput,
    TowerKind,
    tower_kind,
)


@tower_kind("image")
class ConvTower(TowerKind, StageSettings):
    """A small residual convolutional network over images."""

    kind: Literal["conv"] = "conv"
    """Kind of image tower; conv: a small residual convolutional network that trains well on a
    CPU."""
    dropout: Fraction = 0.0
    """Dropout rate of the convolutional encoder's pooled features while training."""

    def build(self, data: TowerInput) -> nn.Module:
        channels, side = data.image.channels, data.image.size
        return ConvEncoder(channels, side, self.widths, self.depths, self.dropout)


@tower_kind("text")
class ConvTextTower(TowerKind):
    """A small residual convolutional network over tokens."""

    kind: Literal["conv"] = "conv"
    """Kind of text tower; conv: a small residual convolutional network over the tokens."""
    width: Count = 128
    """Width of the token embeddings and of the convolutions."""
    layers: Amount = 1
    """Convolutions over three neighboring tokens; 0 pools the token and position embeddings."""
    dropout: Fraction = 0.0
    """Dropout rate of the convolutional encoder's pooled features while training."""

    def build(self, data: TowerInput) -> nn.Module:
        return TokenEncoder(
            data.vocab_size, data.text_length, self.width, self.layers, self.dropout
        )


class ConvEncoder(nn.Module):
    """Encode images float32 [B, C, S, S] to [B, width].

    Each stage halves the side. The last feature map is flattened, not averaged, because at this
    size the mean over positions would lose too much. Its positions are the tokens
    [B, T, token_width].
    """

    def __init__(
        self, channels: int, size: int, widths: tuple[int, ...], depths: tuple[int, ...],
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, stride=2, padding=1)
        self.blocks = residual_stages(widths, depths)
        self.norm = nn.GroupNorm(1, widths[-1])
        self.dropout = nn.Dropout(dropout)
        side = size
        for _ in widths:
            side = -(-side // 2)
        self.width, self.token_width = widths[-1] * side * side, widths[-1]

    def forward(self, images: Tensor, tokens: bool = False) -> Encoded:
        # Feature maps are channels-last, which is the fastest layout on a CPU. The weights stay
        # contiguous, because DeepSpeed broadcasts them as bytes.
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x))
        pooled: Tensor = self.dropout(x.flatten(1))
        return (pooled, x.flatten(2).mT) if tokens else pooled


def residual_stages(widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.ModuleList:
    """Build the residual blocks of each stage, with a halving convolution between two stages."""
    blocks = nn.ModuleList()
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            blocks.append(_Downsample(widths[stage - 1], width))
        blocks.extend(_Residual(width) for _ in range(depth))
    return blocks


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = _he_init(nn.Conv2d(width, width, 3, padding=1, bias=False), gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.conv(F.relu(self.norm(x)))
        return x + update


class _Downsample(nn.Module):
    """Halve the side and change the width."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, inner)
        self.conv = _he_init(nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.relu(self.norm(x)))
        return out


def _he_init(conv: nn.Conv2d, gain: float) -> nn.Conv2d:
    """Initialize as in He et al. (2015), multiplied by `gain`.

    A gain below 1 on residual branches limits the growth of the sum over blocks.
    """
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    with torch.no_grad():
        conv.weight.mul_(gain)
    return conv


class TokenEncoder(nn.Module):
    """Encode token ids int64 [B, L] with a mask bool [B, L] to [B, width].

    Residual convolutions run over three neighboring tokens; the mean and the maximum over the real
    tokens are concatenated. L is at most `length`. The tokens are [B, L, token_width].
    """

    def __init__(
        self, vocab_size: int, length: int, width: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.1)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.blocks = nn.ModuleList(_TokenResidual(width) for _ in range(layers))
        self.norm = nn.LayerNorm(2 * width)
        self.dropout = nn.Dropout(dropout)
        self.width, self.token_width = 2 * width, width

    def forward(self, text: Tensor, mask: Tensor, tokens: bool = False) -> Encoded:
        real = mask.unsqueeze(-1)
        x = self.embedding(text) + self.position[: text.shape[1]]
        for block in self.blocks:
            x = block(x, real)
        mean = (x * real).sum(1) / real.sum(1).clamp(min=1)
        top = x.masked_fill(~real, torch.finfo(x.dtype).min).amax(1)
        pooled: Tensor = self.dropout(self.norm(torch.cat([mean, top], dim=-1)))
        return (pooled, x) if tokens else pooled


class _TokenResidual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(3 * width, width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        # The convolution is one matrix product over each token and its two neighbors; on a CPU and
        # short captions it is several times faster than conv1d.
        y = F.pad(self.norm(x) * real, (0, 0, 1, 1))
        return x + F.relu(self.linear(torch.cat([y[:, :-2], y[:, 1:-1], y[:, 2:]], dim=-1)))
