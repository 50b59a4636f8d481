"""The built-in encoders: small convolutional networks that train well on two CPU cores.

Both are pre-activation residual networks (He et al. 2016) with one-group GroupNorm, whose
statistics are per sample, so that a sample's embedding does not depend on its micro-batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Encoded = Tensor | tuple[Tensor, Tensor]


class ConvEncoder(nn.Module):
    """images [B, C, S, S] -> [B, width]. Each stage halves the side; the last map is flattened,
    since at this size positions matter more than their average. Its places are the tokens
    [B, T, token_width], asked for with `tokens`."""

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
        # The maps run channels-last, which is fastest on a CPU; the weights stay as they are, since
        # DeepSpeed broadcasts them as bytes.
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x))
        pooled = self.dropout(x.flatten(1))
        return (pooled, x.flatten(2).mT) if tokens else pooled


def residual_stages(widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.ModuleList:
    """The residual blocks of each stage, and between two stages what halves the sides."""
    blocks = nn.ModuleList()
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            blocks.append(_Shrink(widths[stage - 1], width))
        blocks.extend(_Residual(width) for _ in range(depth))
    return blocks


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = _he(nn.Conv2d(width, width, 3, padding=1, bias=False), gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.norm(x)))


class _Shrink(nn.Module):
    """Halve the side, change the width."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, inner)
        self.conv = _he(nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.norm(x)))


def _he(conv: nn.Conv2d, gain: float) -> nn.Conv2d:
    """He et al.'s (2015) initial weights times `gain`: below 1 on a residual branch, so that the
    sum over blocks does not grow."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    with torch.no_grad():
        conv.weight.mul_(gain)
    return conv


class TokenEncoder(nn.Module):
    """text int64 [B, L], L up to `length`, mask bool [B, L] -> [B, width]: residual convolutions
    of width 3 over the caption, then the mean and the maximum over its real tokens; with `tokens`,
    those too, [B, L, token_width]."""

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
        pooled = self.dropout(self.norm(torch.cat([mean, top], dim=-1)))
        return (pooled, x) if tokens else pooled


class _TokenResidual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(3 * width, width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        # A convolution as one matrix product over each token and its neighbours: on short
        # captions several times faster than conv1d on a CPU.
        y = F.pad(self.norm(x) * real, (0, 0, 1, 1))
        return x + F.relu(self.linear(torch.cat([y[:, :-2], y[:, 1:-1], y[:, 2:]], dim=-1)))
