"""Apply image operations to a batch, with parameters per image; nothing here is random.

`ImageTransforms` holds the parameters and `apply_transforms` applies them. Every operation except
the color matrix is elementwise or a `grid_sample`, so a row's result does not depend on the batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU_BLOCK = 1 << 19
"""Number of floats that a CPU thread processes at a time. They fit in its cache, which makes it 1.5
to 2 times as fast."""


class ImageTransforms(NamedTuple):
    """Parameters of the operations on B images, in the order applied; None skips an operation."""

    affine: Tensor | None = None
    """[B, 2, 3]: maps output to input coordinates, both in [-1, 1]."""
    blur_kernel: Tensor | None = None
    """[B, 2 R + 1]: weights of a blur along both axes."""
    color_matrix: Tensor | None = None
    """[B, C, C]: maps colors, with `color_offset` [B, 1, 1]: x -> M x + b."""
    color_offset: Tensor | None = None
    noise: Tensor | None = None
    """[B, C, H, W]: added to the pixels."""
    erase_box: Tensor | None = None
    """[B, 4]: boxes painted mid-gray: half width, half height, center (x, y), in [-1, 1]."""

    def rows(self, part: slice) -> ImageTransforms:
        """Return the parameters of some of the images."""
        return ImageTransforms(*(None if t is None else t[part] for t in self))


def apply_transforms(images: Tensor, transforms: ImageTransforms) -> Tensor:
    """Apply `transforms` to a batch; pixels from outside an image repeat its border.

    Args:
        images: uint8 [B, C, H, W].
        transforms: Parameters for B images.

    Returns:
        float32 [B, C, H, W], about in [0, 1].
    """
    batch, size = images.shape[0], math.prod(images.shape[1:])
    rows = max(1, batch)
    if images.device.type == "cpu":
        rows = max(1, _CPU_BLOCK * torch.get_num_threads() // size)
    out = torch.empty(images.shape, device=images.device)
    for start in range(0, batch, rows):
        part = slice(start, start + rows)
        out[part] = _apply(images[part].float() / 255, transforms.rows(part))
    return out


def _apply(pixels: Tensor, t: ImageTransforms) -> Tensor:
    """Apply all operations to float32 [B, C, H, W]."""
    if t.affine is not None:
        grid = F.affine_grid(t.affine, list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    if t.blur_kernel is not None:
        pixels = _blur(_blur(pixels, t.blur_kernel, 2), t.blur_kernel, 3)
    if t.color_matrix is not None and t.color_offset is not None:
        pixels = _map_colors(pixels, t.color_matrix, t.color_offset)
    if t.noise is not None:
        pixels = pixels + t.noise
    if t.erase_box is not None:
        pixels = _erase(pixels, t.erase_box)
    return pixels


def _blur(pixels: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Blur along one axis, as a weighted sum of shifted images.

    Grouped convolution is no faster, and its rounding depends on the algorithm a device chooses.
    """
    radius, length = kernel.shape[1] // 2, pixels.shape[axis]
    pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
    padded = F.pad(pixels, pad, mode="replicate")
    weights = kernel.view(*kernel.shape, 1, 1, 1).unbind(1)
    total = pixels * weights[radius]
    for shift, weight in enumerate(weights):
        if shift != radius:
            total.addcmul_(weight, padded.narrow(axis, shift, length))
    return total


def _map_colors(pixels: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Return M x + b for every pixel x."""
    batch, channels = pixels.shape[:2]
    if channels == 1:
        return pixels * matrix.unsqueeze(-1) + offset.unsqueeze(-1)
    flat = torch.baddbmm(offset.expand(batch, channels, 1), matrix, pixels.flatten(2))
    return flat.view_as(pixels)


def _erase(pixels: Tensor, box: Tensor) -> Tensor:
    """Paint mid-gray every pixel whose center lies in the box."""
    height, width = pixels.shape[2:]
    half_width, half_height, x, y = box.view(-1, 4, 1).unbind(1)
    columns = (_centers(width, box.device) - x).abs() < half_width
    lines = (_centers(height, box.device) - y).abs() < half_height
    inside = (lines.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
    gray = torch.full((), 0.5, device=pixels.device)
    return torch.lerp(pixels, gray, inside.float())  # exact at 0 and 1; `masked_fill` is slow


def _centers(count: int, device: torch.device) -> Tensor:
    """Return the centers of `count` equal parts of [-1, 1], float32 [count]."""
    return (2 * torch.arange(count, device=device) + 1) / count - 1
