"""Towers and data stages as users would write them, some of them faulty."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def darken(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        yield sample | {"image": sample["image"] // 2}


def failing_stage(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        yield sample | {"image": sample["depth"]}


class Pixels(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(3, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(1000, width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return (self.embedding(tokens) * mask.unsqueeze(-1)).sum(1)


class Statistics(nn.Module):
    """Encode audio or vectors by mean, mean square, size, and mask or lengths."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(4, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        flat = x.flatten(1)
        real = flat.new_zeros(len(flat)) if mask is None else mask.reshape(len(x), -1).sum(1)
        size = torch.full_like(real, flat.shape[1])
        features = [flat.mean(1), flat.square().mean(1), size, real]
        return self.linear(torch.stack([torch.tanh(f / 1000) for f in features], 1))


class Broken(Pixels):
    """Return NaN always."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * torch.nan


class BrokenBackward(Pixels):
    """Return finite vectors, with NaN gradients while `_NanGradient.broken` is true."""

    def forward(self, images: Tensor) -> Tensor:
        return _NanGradient.apply(super().forward(images))


class _NanGradient(torch.autograd.Function):
    broken = False

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.nan if _NanGradient.broken else grad


class Crashing(Pixels):
    """Raise at the first batch."""

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("this tower cannot see")


class Normed(Pixels):
    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(super().forward(images))


class Scaled(Pixels):
    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.temperature


class Heavy(Pixels):
    """Fast steps, but 120 MB to save."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("ballast", torch.zeros(30_000_000))


class Stuck(Pixels):
    """Hang in the hundredth batch."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        Stuck.calls += 1
        if Stuck.calls == 100:
            threading.Event().wait()
        return super().forward(images)


class SlowOnRankOne(Pixels):
    """Slow on rank 1 only."""

    def forward(self, images: Tensor) -> Tensor:
        if os.environ.get("RANK") == "1":
            time.sleep(0.1)
        return super().forward(images)


class NanForTwelveBatches(Pixels):
    """Return NaN in batches 41 to 52."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        NanForTwelveBatches.calls += 1
        out = super().forward(images)
        return out * torch.nan if 40 < NanForTwelveBatches.calls <= 52 else out


class CrashingOnRankOne(Pixels):
    """Raise on rank 1 only, at the twentieth batch; the other ranks lose their peer."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        CrashingOnRankOne.calls += 1
        if os.environ.get("RANK") == "1" and CrashingOnRankOne.calls == 20:
            raise RuntimeError("this tower is out of order")
        return super().forward(images)


class Slow(Pixels):
    """Slow until the file `fast` exists."""

    def __init__(self, fast: str, width: int = 4) -> None:
        super().__init__(width)
        self.fast = Path(fast)

    def forward(self, images: Tensor) -> Tensor:
        if not self.fast.exists():
            time.sleep(0.1)
        return super().forward(images)


class FailingLater(Pixels):
    """Raise after `batches` batches of a process."""

    def __init__(self, batches: int, width: int = 4) -> None:
        super().__init__(width)
        self.left = batches

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of batches")
        return super().forward(images)


class Returns(nn.Module):
    """Return something else than vectors [B, 4]."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.width, self.what = 4, what
        self.linear = nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Any:
        rows = self.linear(x.float().flatten(1).mean(1, keepdim=True))
        match self.what.removeprefix("vector "):
            case "narrow":
                return rows[:, :3]
            case "integers":
                return rows.long()
            case "complex":
                return rows + 1j
            case "one":
                return rows.mean(0, keepdim=True)
            case "map":
                return rows[:, :, None, None]
            case "dict":
                return {"pooled": rows}
            case "none":
                return None
            case "detached":
                return rows.detach()
            case "no_grad":
                return torch.tensor(rows.tolist())
        return rows[:, None]


class Exiting(Pixels):
    """Fail in the constructor with an error of an unusual type."""

    def __init__(self) -> None:
        super().__init__(1 // 0)


class NarrowTokens(Pixels):
    """Return tokens of another width than `token_width`."""

    token_width = 5

    def forward(self, images: Tensor, tokens: bool = False) -> Any:
        rows = super().forward(images)
        return (rows, rows[:, None].expand(-1, 3, -1)) if tokens else rows
