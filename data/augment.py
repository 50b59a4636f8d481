"""Augmentation of whole batches on the device, as a pure function of (images, key).

The random numbers are keyed uniforms [B, k]; the work is one `grid_sample` and one colour matrix
a batch. Run it again with the same key and the same pixels come out, which is how the second pass
of the exact step replays it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gigabatch.data import keyed
from gigabatch.data.settings import Settings


class Augmentation(Settings):
    """Ranges of the random changes; 0 turns each off. Every draw is uniform."""

    zoom: float = Field(0.0, ge=0, lt=1)
    """Scale by exp(u), u within +-zoom."""
    aspect: float = Field(0.0, ge=0, lt=1)
    """Width against height by exp(u), u within +-aspect."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Degrees, either way."""
    shear: float = Field(0.0, ge=0, le=60)
    """Degrees of horizontal shear, either way."""
    shift: float = Field(0.0, ge=0, le=0.5)
    """Translation, as a fraction of the side, either way, in x and in y."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a left-right flip."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Added to pixels in [0, 1], either way."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Scales the distance from mid-grey by exp(u), u within +-contrast."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Moves towards grey by up to this fraction (1: some images lose all colour)."""
    hue: float = Field(0.0, ge=0, le=180)
    """Rotates colour about the grey axis, degrees, either way."""
    noise: float = Field(0.0, ge=0, le=1)
    """Standard deviation of the pixel noise, up to this, in units of the [0, 1] range."""

    @property
    def moves(self) -> bool:
        return any((self.zoom, self.aspect, self.rotate, self.shear, self.shift, self.flip))

    @property
    def colours(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue))


_DRAWS = 12


def augment(images: Tensor, settings: Augmentation, stream: int) -> Tensor:
    """float32 [B, C, H, W] in about [0, 1], from uint8 [B, C, H, W]; `stream` is the key.

    Pixels that move in from outside repeat the border.
    """
    batch = images.shape[0]
    pixels = images.float() / 255
    draws = torch.from_numpy(keyed.uniforms(stream, batch, _DRAWS)).to(images.device)
    if settings.moves:
        grid = F.affine_grid(_affine(draws, settings), list(images.shape), align_corners=False)
        pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    if settings.colours:
        pixels = _recolour(pixels, draws, settings)
    if settings.noise:
        level = draws[:, 10].view(-1, 1, 1, 1) * settings.noise
        pixels = pixels + level * _normal(pixels, keyed.key(stream, "noise"))
    return pixels


def _spread(draw: Tensor, limit: float) -> Tensor:
    return (2 * draw - 1) * limit


def _affine(draws: Tensor, s: Augmentation) -> Tensor:
    """[B, 2, 3] maps of output to input coordinates, both in [-1, 1]."""
    zoom, aspect = _spread(draws[:, 0], s.zoom), _spread(draws[:, 1], s.aspect) / 2
    angle = _spread(draws[:, 2], math.radians(s.rotate))
    slant = torch.tan(_spread(draws[:, 3], math.radians(s.shear)))
    mirror = torch.where(draws[:, 6] < s.flip, -1.0, 1.0)
    across, down = torch.exp(-zoom - aspect) * mirror, torch.exp(-zoom + aspect)
    cos, sin = torch.cos(angle), torch.sin(angle)
    x = torch.stack([cos * across, (slant * cos - sin) * down, _spread(draws[:, 4], 2 * s.shift)])
    y = torch.stack([sin * across, (slant * sin + cos) * down, _spread(draws[:, 5], 2 * s.shift)])
    return torch.stack([x, y]).permute(2, 0, 1)


def _recolour(pixels: Tensor, draws: Tensor, s: Augmentation) -> Tensor:
    """One colour matrix and one offset an image: x -> M x + b."""
    batch, channels = pixels.shape[:2]
    gain = torch.exp(_spread(draws[:, 7], s.contrast)).view(-1, 1, 1)
    offset = (1 - gain) / 2 + _spread(draws[:, 8], s.brightness).view(-1, 1, 1)
    if channels == 1:
        return pixels * gain.unsqueeze(-1) + offset.unsqueeze(-1)
    grey = torch.full((3, 3), 1 / 3, device=pixels.device)
    keep = 1 - draws[:, 9].view(-1, 1, 1) * s.saturation
    turn = _hue_rotation(_spread(draws[:, 11], math.radians(s.hue)))
    matrix = gain * (grey + keep * (turn - grey))
    flat = torch.baddbmm(offset.expand(batch, 3, 1), matrix, pixels.flatten(2))
    return flat.view_as(pixels)


def _hue_rotation(angle: Tensor) -> Tensor:
    """[B, 3, 3] rotations about the grey axis (Rodrigues' formula)."""
    cos, sin = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    eye = torch.eye(3, device=angle.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device) / math.sqrt(3)
    return cos * eye + sin * cross + (1 - cos) / 3


def _normal(like: Tensor, stream: int) -> Tensor:
    """Standard normal noise, drawn on the CPU so that every device sees the same."""
    generator = torch.Generator().manual_seed(stream % (1 << 63))
    return torch.randn(like.shape, generator=generator).to(like.device)
