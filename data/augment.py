"""Augmentation of whole batches on the device, as a pure function of (images, key).

The random numbers are keyed uniforms [B, k], made into one affine map, one colour matrix and so
on for each image; `pixels.py` does the work. Run it again with the same key and the same pixels
come out, which is how the second pass of the exact step replays it.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from gigabatch.data import rng as keyed
from gigabatch.data.image_ops import Changes, apply_changes
from gigabatch.data.settings import Settings


class Augmentation(Settings):
    """Ranges of the random changes; 0 turns each off. Every draw is uniform."""

    crop: float = Field(0.0, ge=0, le=1)
    """Least share of the area that a random resized crop keeps (0.08 for strong augmentation)."""
    zoom: float = Field(0.0, ge=0, lt=1)
    """Scale by exp(u), u within +-zoom."""
    aspect: float = Field(0.0, ge=0, lt=1)
    """Width against height by exp(u), u within +-aspect; with `crop`, the shape of the crop."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Degrees, either way."""
    shear: float = Field(0.0, ge=0, le=60)
    """Degrees of horizontal shear, either way."""
    shift: float = Field(0.0, ge=0, le=0.5)
    """Translation, as a fraction of the side, either way, in x and in y."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a left-right flip."""
    blur: float = Field(0.0, ge=0, le=32)
    """Standard deviation of a Gaussian blur, up to this, in pixels."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Added to pixels in [0, 1], either way."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Scales the distance from mid-grey by exp(u), u within +-contrast."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Moves towards grey by up to this fraction (1: some images lose all colour)."""
    grey: float = Field(0.0, ge=0, le=1)
    """Probability of losing all colour; grey is the mean of the channels."""
    hue: float = Field(0.0, ge=0, le=180)
    """Rotates colour about the grey axis, degrees, either way."""
    noise: float = Field(0.0, ge=0, le=1)
    """Standard deviation of the pixel noise, up to this, in units of the [0, 1] range."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability that a rectangle of 2 to 33 % of the area is made mid-grey."""

    @property
    def moves(self) -> bool:
        moves = (self.zoom, self.aspect, self.rotate, self.shear, self.shift, self.flip)
        return any((self.crop, *moves))

    @property
    def colours(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.grey))


_DRAWS = 12  # fixed: with another number of columns, every draw of an old run would change
_ERASED, _ERASED_ASPECT = (0.02, 0.33), 1 / 0.3  # Zhong et al. 2020, Random Erasing


def augment(images: Tensor, settings: Augmentation, stream: int) -> Tensor:
    """float32 [B, C, H, W] in about [0, 1], from uint8 [B, C, H, W]; `stream` is the key.

    Pixels that move in from outside repeat the border.
    """
    draws = _draw(images, stream, _DRAWS)
    affine = kernel = matrix = offset = noise = hole = None
    if settings.moves:
        affine = _affine(draws, settings)
    if settings.crop and affine is not None:
        crop = _draw(images, keyed.key(stream, "crop"), 3)
        affine = _into(_crop_boxes(crop, draws, settings), affine)
    if settings.blur:
        kernel = _kernels(_draw(images, keyed.key(stream, "blur"), 1), settings.blur)
    if settings.colours:
        grey = _draw(images, keyed.key(stream, "grey"), 1)[:, 0] < settings.grey
        matrix, offset = _colours(draws, grey, images.shape[1], settings)
    if settings.noise:
        level = draws[:, 10].view(-1, 1, 1, 1) * settings.noise
        noise = _normal(images, keyed.key(stream, "noise")).mul_(level)
    if settings.erase:
        hole = _hole_boxes(_draw(images, keyed.key(stream, "erase"), 5), settings.erase)
    return apply_changes(images, Changes(affine, kernel, matrix, offset, noise, hole))


def _draw(images: Tensor, stream: int, columns: int) -> Tensor:
    """Uniforms [B, columns], on the images' device."""
    return torch.from_numpy(keyed.uniforms(stream, images.shape[0], columns)).to(images.device)


def _spread(draw: Tensor, limit: float) -> Tensor:
    return (2 * draw - 1) * limit


def _affine(draws: Tensor, s: Augmentation) -> Tensor:
    """[B, 2, 3] maps of output to input coordinates, both in [-1, 1]."""
    zoom = _spread(draws[:, 0], s.zoom)
    aspect = _spread(draws[:, 1], 0.0 if s.crop else s.aspect) / 2
    angle = _spread(draws[:, 2], math.radians(s.rotate))
    slant = torch.tan(_spread(draws[:, 3], math.radians(s.shear)))
    mirror = torch.where(draws[:, 6] < s.flip, -1.0, 1.0)
    across, down = torch.exp(-zoom - aspect) * mirror, torch.exp(-zoom + aspect)
    cos, sin = torch.cos(angle), torch.sin(angle)
    x = torch.stack([cos * across, (slant * cos - sin) * down, _spread(draws[:, 4], 2 * s.shift)])
    y = torch.stack([sin * across, (slant * sin + cos) * down, _spread(draws[:, 5], 2 * s.shift)])
    return torch.stack([x, y]).permute(2, 0, 1)


def _crop_boxes(crop: Tensor, draws: Tensor, s: Augmentation) -> Tensor:
    area = s.crop + (1 - s.crop) * crop[:, 0]
    return _boxes(area, _spread(draws[:, 1], -s.aspect), crop[:, 1:])


def _into(boxes: Tensor, affine: Tensor) -> Tensor:
    """`affine` within boxes: their edges are its -1 and 1. So the crop precedes the moves."""
    size, centre = boxes.view(-1, 2, 2, 1).unbind(1)
    return torch.cat([affine[:, :, :2] * size, affine[:, :, 2:] * size + centre], 2)


def _hole_boxes(draws: Tensor, probability: float) -> Tensor:
    least, most = _ERASED
    stretch = _spread(draws[:, 2], math.log(_ERASED_ASPECT))
    boxes = _boxes(least + (most - least) * draws[:, 1], stretch, draws[:, 3:])
    return boxes * (draws[:, :1] < probability)  # of no size where nothing is erased


def _boxes(area: Tensor, stretch: Tensor, place: Tensor) -> Tensor:
    """[B, 4] boxes inside the image: half width, half height, centre (x, y), in [-1, 1].

    `area` [B]: share of the image's. `stretch` [B]: logarithm of width against height, limited so
    that neither side passes the image's. `place` [B, 2]: uniforms.
    """
    room = -torch.log(area)
    half = torch.minimum(torch.maximum(stretch, -room), room) / 2
    size = (torch.sqrt(area).unsqueeze(1) * torch.exp(torch.stack([half, -half], 1))).clamp(max=1)
    return torch.cat([size, (2 * place - 1) * (1 - size)], 1)


def _kernels(draw: Tensor, limit: float) -> Tensor:
    """[B, 2 R + 1] Gaussians of standard deviation up to `limit`, cut at three times the limit."""
    radius = math.ceil(3 * limit)
    places = torch.arange(-radius, radius + 1, device=draw.device)
    sigma = (draw * limit).clamp(min=1e-3)  # as good as none; 0 would give 0 / 0
    weights = torch.exp(-(places**2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


def _colours(draws: Tensor, grey: Tensor, channels: int, s: Augmentation) -> tuple[Tensor, Tensor]:
    """One colour matrix [B, C, C] and one offset [B, 1, 1] an image: x -> M x + b."""
    gain = torch.exp(_spread(draws[:, 7], s.contrast)).view(-1, 1, 1)
    offset = (1 - gain) / 2 + _spread(draws[:, 8], s.brightness).view(-1, 1, 1)
    if channels == 1:
        return gain, offset
    mean = torch.full((3, 3), 1 / 3, device=draws.device)
    keep = (1 - draws[:, 9] * s.saturation).masked_fill(grey, 0.0).view(-1, 1, 1)
    turn = _hue_rotation(_spread(draws[:, 11], math.radians(s.hue)))
    return gain * (mean + keep * (turn - mean)), offset


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
