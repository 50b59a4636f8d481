"""Changes of a batch of images by numbers given for each image: no chance in here.

`Changes` says what is to be done, a small tensor a kind; `apply_changes` does it. Every step but
the colour matrix is elementwise or a `grid_sample`, so a row comes out the same in any batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 1 << 19
"""Floats a thread works on at a time on the CPU: what its cache holds (1.5 to 2 times faster)."""


class Changes(NamedTuple):
    """What is done to each of B images, in this order; None: nothing of the kind."""

    affine: Tensor | None = None
    """[B, 2, 3] maps of output to input coordinates, both in [-1, 1]."""
    kernel: Tensor | None = None
    """[B, 2 R + 1] blurs, along both axes."""
    matrix: Tensor | None = None
    """[B, C, C] maps of colours, with `offset` [B, 1, 1]: x -> M x + b."""
    offset: Tensor | None = None
    noise: Tensor | None = None
    """[B, C, H, W], added."""
    hole: Tensor | None = None
    """[B, 4] boxes made mid-grey: half width, half height, centre (x, y), in [-1, 1]."""

    def rows(self, part: slice) -> Changes:
        return Changes(*(None if t is None else t[part] for t in self))


def apply_changes(images: Tensor, changes: Changes) -> Tensor:
    """float32 [B, C, H, W] in about [0, 1], from uint8 [B, C, H, W].

    Pixels that move in from outside repeat the border.
    """
    batch, size = images.shape[0], math.prod(images.shape[1:])
    rows = max(1, batch)
    if images.device.type == "cpu":
        rows = max(1, _AT_ONCE * torch.get_num_threads() // size)
    out = torch.empty(images.shape, device=images.device)
    for start in range(0, batch, rows):
        part = slice(start, start + rows)
        out[part] = _apply(images[part].float() / 255, changes.rows(part))
    return out


def _apply(pixels: Tensor, c: Changes) -> Tensor:
    if c.affine is not None:
        grid = F.affine_grid(c.affine, list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    if c.kernel is not None:
        pixels = _blur(_blur(pixels, c.kernel, 2), c.kernel, 3)
    if c.matrix is not None and c.offset is not None:
        pixels = _recolour(pixels, c.matrix, c.offset)
    if c.noise is not None:
        pixels = pixels + c.noise
    if c.hole is not None:
        pixels = _erase(pixels, c.hole)
    return pixels


def _blur(pixels: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Along one axis, as a sum of shifted images. (Grouped convolution is as fast at its best, and
    its rounding depends on the device's choice of algorithm.)"""
    radius, length = kernel.shape[1] // 2, pixels.shape[axis]
    pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
    wide = F.pad(pixels, pad, mode="replicate")
    weights = kernel.view(*kernel.shape, 1, 1, 1).unbind(1)
    total = pixels * weights[radius]
    for shift, weight in enumerate(weights):
        if shift != radius:
            total.addcmul_(weight, wide.narrow(axis, shift, length))
    return total


def _recolour(pixels: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    batch, channels = pixels.shape[:2]
    if channels == 1:
        return pixels * matrix.unsqueeze(-1) + offset.unsqueeze(-1)
    flat = torch.baddbmm(offset.expand(batch, channels, 1), matrix, pixels.flatten(2))
    return flat.view_as(pixels)


def _erase(pixels: Tensor, box: Tensor) -> Tensor:
    """Mid-grey where a pixel's centre lies in the box."""
    height, width = pixels.shape[2:]
    across, down, x, y = box.view(-1, 4, 1).unbind(1)
    columns = (_centres(width, box.device) - x).abs() < across
    lines = (_centres(height, box.device) - y).abs() < down
    inside = (lines.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
    grey = torch.full((), 0.5, device=pixels.device)
    return torch.lerp(pixels, grey, inside.float())  # exact at 0 and 1; `masked_fill` is slow


def _centres(count: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(count, device=device) + 1) / count - 1
