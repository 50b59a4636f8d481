"""Augment a batch of images on its device, as a pure function of (images, RNG key).

Uniform random numbers [B, k] become one affine map, one color matrix and so on for each image;
`image_ops.py` applies them. The same key gives the same pixels, which is how the second forward
pass of the exact step replays the augmentation of the first.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from gigabatch.data import rng
from gigabatch.data.image_ops import ImageTransforms, apply_transforms
from gigabatch.data.settings import Settings


class Augmentation(Settings):
    """Ranges of the random changes; 0 turns a change off. Every draw is uniform."""

    crop: float = Field(0.0, ge=0, le=1)
    """Minimum share of the area that a random resized crop keeps (0.08 is strong); 0: no crop."""
    zoom: float = Field(0.0, ge=0, lt=1)
    """Scale the image by exp(u), u within +-zoom."""
    aspect: float = Field(0.0, ge=0, lt=1)
    """Scale width over height by exp(u), u within +-aspect; with `crop`, the crop's shape."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Largest rotation, in degrees, in either direction."""
    shear: float = Field(0.0, ge=0, le=60)
    """Largest horizontal shear, in degrees, in either direction."""
    shift: float = Field(0.0, ge=0, le=0.5)
    """Largest translation in x and in y, as a fraction of the side, in either direction."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a left-right flip."""
    blur: float = Field(0.0, ge=0, le=32)
    """Largest standard deviation of a Gaussian blur, in pixels."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Largest value added to or subtracted from pixels in [0, 1]."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Scale the distance of pixels from mid-gray by exp(u), u within +-contrast."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Largest fraction of the color to remove; 1 makes some images fully gray."""
    grey: float = Field(0.0, ge=0, le=1)
    """Probability of removing all color; gray is the mean of the channels."""
    hue: float = Field(0.0, ge=0, le=180)
    """Largest rotation of colors about the gray axis, in degrees, in either direction."""
    noise: float = Field(0.0, ge=0, le=1)
    """Largest standard deviation of the pixel noise, in units of the [0, 1] range."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability of painting a rectangle of 2 to 33 % of the area mid-gray."""

    @property
    def moves_pixels(self) -> bool:
        """Whether a setting needs the affine map."""
        affine = (self.zoom, self.aspect, self.rotate, self.shear, self.shift, self.flip)
        return any((self.crop, *affine))

    @property
    def changes_colors(self) -> bool:
        """Whether a setting needs the color matrix."""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.grey))


_DRAWS = 12  # fixed: a different number would change every draw of an old run
_ERASED_AREA = (0.02, 0.33)  # Zhong et al. 2020, Random Erasing
_ERASED_ASPECT = 1 / 0.3


def augment(images: Tensor, settings: Augmentation, rng_key: int) -> Tensor:
    """Augment a batch of images; pixels from outside an image repeat its border.

    Args:
        images: uint8 [B, C, H, W].
        settings: Ranges of the changes.
        rng_key: 64-bit key of all randomness.

    Returns:
        float32 [B, C, H, W], about in [0, 1].
    """
    draws = _uniforms(images, rng_key, _DRAWS)
    affine = kernel = matrix = offset = noise = erase_box = None
    if settings.moves_pixels:
        affine = _affine_maps(draws, settings)
    if settings.crop and affine is not None:
        crop = _uniforms(images, rng.key(rng_key, "crop"), 3)
        affine = _affine_within(_crop_boxes(crop, draws, settings), affine)
    if settings.blur:
        kernel = _blur_kernels(_uniforms(images, rng.key(rng_key, "blur"), 1), settings.blur)
    if settings.changes_colors:
        gray = _uniforms(images, rng.key(rng_key, "grey"), 1)[:, 0] < settings.grey
        matrix, offset = _color_maps(draws, gray, images.shape[1], settings)
    if settings.noise:
        level = draws[:, 10].view(-1, 1, 1, 1) * settings.noise
        noise = _normal(images, rng.key(rng_key, "noise")).mul_(level)
    if settings.erase:
        erase_draws = _uniforms(images, rng.key(rng_key, "erase"), 5)
        erase_box = _erase_boxes(erase_draws, settings.erase)
    transforms = ImageTransforms(affine, kernel, matrix, offset, noise, erase_box)
    return apply_transforms(images, transforms)


def _uniforms(images: Tensor, rng_key: int, columns: int) -> Tensor:
    """Return uniform numbers in [0, 1), float32 [B, columns], on the images' device."""
    return torch.from_numpy(rng.uniforms(rng_key, images.shape[0], columns)).to(images.device)


def _symmetric(draw: Tensor, limit: float) -> Tensor:
    """Map uniform numbers in [0, 1) to [-limit, limit)."""
    return (2 * draw - 1) * limit


def _affine_maps(draws: Tensor, s: Augmentation) -> Tensor:
    """Return float32 [B, 2, 3]: maps of output to input coordinates, both in [-1, 1]."""
    zoom = _symmetric(draws[:, 0], s.zoom)
    aspect = _symmetric(draws[:, 1], 0.0 if s.crop else s.aspect) / 2
    angle = _symmetric(draws[:, 2], math.radians(s.rotate))
    slant = torch.tan(_symmetric(draws[:, 3], math.radians(s.shear)))
    mirror = torch.where(draws[:, 6] < s.flip, -1.0, 1.0)
    scale_x, scale_y = torch.exp(-zoom - aspect) * mirror, torch.exp(-zoom + aspect)
    cos, sin = torch.cos(angle), torch.sin(angle)
    shift_x, shift_y = (_symmetric(draws[:, column], 2 * s.shift) for column in (4, 5))
    x = torch.stack([cos * scale_x, (slant * cos - sin) * scale_y, shift_x])
    y = torch.stack([sin * scale_x, (slant * sin + cos) * scale_y, shift_y])
    return torch.stack([x, y]).permute(2, 0, 1)


def _crop_boxes(crop: Tensor, draws: Tensor, s: Augmentation) -> Tensor:
    """Return the boxes of random resized crops, float32 [B, 4]."""
    area = s.crop + (1 - s.crop) * crop[:, 0]
    return _boxes(area, _symmetric(draws[:, 1], -s.aspect), crop[:, 1:])


def _affine_within(boxes: Tensor, affine: Tensor) -> Tensor:
    """Compose maps so that [-1, 1] of `affine` spans the box; the crop then precedes the moves."""
    size, center = boxes.view(-1, 2, 2, 1).unbind(1)
    return torch.cat([affine[:, :, :2] * size, affine[:, :, 2:] * size + center], 2)


def _erase_boxes(draws: Tensor, probability: float) -> Tensor:
    """Return boxes to erase, float32 [B, 4]; of size zero where nothing is erased."""
    smallest, largest = _ERASED_AREA
    log_aspect = _symmetric(draws[:, 2], math.log(_ERASED_ASPECT))
    boxes = _boxes(smallest + (largest - smallest) * draws[:, 1], log_aspect, draws[:, 3:])
    return boxes * (draws[:, :1] < probability)


def _boxes(area: Tensor, log_aspect: Tensor, position: Tensor) -> Tensor:
    """Return boxes inside the image.

    Args:
        area: float32 [B], as a share of the image's.
        log_aspect: float32 [B], log of width over height; clamped so that the box fits.
        position: float32 [B, 2], uniform in [0, 1).

    Returns:
        float32 [B, 4]: half width, half height, center (x, y), in [-1, 1].
    """
    limit = -torch.log(area)
    half = torch.minimum(torch.maximum(log_aspect, -limit), limit) / 2
    size = (torch.sqrt(area).unsqueeze(1) * torch.exp(torch.stack([half, -half], 1))).clamp(max=1)
    return torch.cat([size, (2 * position - 1) * (1 - size)], 1)


def _blur_kernels(draw: Tensor, limit: float) -> Tensor:
    """Return Gaussians of standard deviation up to `limit`, cut off at 3 `limit`: [B, 2 R + 1]."""
    radius = math.ceil(3 * limit)
    offsets = torch.arange(-radius, radius + 1, device=draw.device)
    sigma = (draw * limit).clamp(min=1e-3)  # 1e-3 blurs nothing; 0 would give 0 / 0
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


def _color_maps(
    draws: Tensor, gray: Tensor, channels: int, s: Augmentation
) -> tuple[Tensor, Tensor]:
    """Return the color map x -> M x + b of every image: M [B, C, C] and b [B, 1, 1]."""
    gain = torch.exp(_symmetric(draws[:, 7], s.contrast)).view(-1, 1, 1)
    offset = (1 - gain) / 2 + _symmetric(draws[:, 8], s.brightness).view(-1, 1, 1)
    if channels == 1:
        return gain, offset
    mean = torch.full((3, 3), 1 / 3, device=draws.device)
    keep = (1 - draws[:, 9] * s.saturation).masked_fill(gray, 0.0).view(-1, 1, 1)
    rotation = _hue_rotations(_symmetric(draws[:, 11], math.radians(s.hue)))
    return gain * (mean + keep * (rotation - mean)), offset


def _hue_rotations(angle: Tensor) -> Tensor:
    """Return rotations about the gray axis (Rodrigues' formula), float32 [B, 3, 3]."""
    cos, sin = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    eye = torch.eye(3, device=angle.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device) / math.sqrt(3)
    return cos * eye + sin * cross + (1 - cos) / 3


def _normal(like: Tensor, rng_key: int) -> Tensor:
    """Return standard normal noise, drawn on the CPU so that it is the same for every device."""
    generator = torch.Generator().manual_seed(rng_key % (1 << 63))
    return torch.randn(like.shape, generator=generator).to(like.device)
