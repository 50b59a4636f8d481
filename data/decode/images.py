"""Decode images to pixels: the one implementation for training, evaluation and inference.

`docs/data.md` specifies every step under "Pixels". `ImageSettings.version` pins the steps of a run.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from gigabatch.data.decode import images_v1
from gigabatch.data.decode.image_memory import FORMATS, TooLarge
from gigabatch.data.decode.image_steps import Upright, decode_upright
from gigabatch.data.decode.signatures import explain_failure
from gigabatch.data.errors import BadSample
from gigabatch.data.settings import Settings

IMAGE_MEMBERS = ("png", "jpg", "jpeg", "webp")
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageSettings(Settings):
    """Decoding, size and normalization of images."""

    member: str | None = Field(None, pattern=r"^[^/\s]+$")
    """Extension of the image's member, such as `jpg`, for samples that have several: an image and
    its mask. Unset: the only one of png, jpg, jpeg and webp; a sample with two of them is an
    error."""
    size: int = Field(224, ge=8)
    """Side length in pixels of the square that towers see."""
    channels: Literal[1, 3] = 3
    """Color channels: 3 for RGB, 1 for gray."""
    mean: float | tuple[float, ...] = 0.5
    """Value subtracted from pixels in [0, 1]: one for all channels, or a list with one per
    channel."""
    std: float | tuple[float, ...] = 0.5
    """Value that pixels are divided by after `mean` is subtracted: one for all channels, or a list
    with one per channel."""
    resize: Literal["shortest", "squash", "pad"] = "shortest"
    """How an image becomes a square. shortest: its shorter side is resized to `size`, then the
    center is cropped. squash: both sides are resized to `size`. pad: its longer side is resized to
    `size`, then the shorter side is padded with `fill`."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Filter of the resize. All but `nearest` are antialiased, as in Pillow and in the PIL path of
    torchvision and Hugging Face."""
    crop: Literal["torchvision", "huggingface"] = "torchvision"
    """Offset of the center crop when d pixels are left over: int(round(d / 2)) as in torchvision,
    or int(d / 2) as in Hugging Face's image processors."""
    fill: int | tuple[int, ...] = 0
    """Color of the padding of `resize: pad`, from 0 to 255: one for all channels, or a list with
    one per channel."""
    draft: bool | None = None
    """Let libjpeg decode a large JPEG at 1/2, 1/4 or 1/8 of its size, at least as large as the
    resized image, and resize only the cropped part of any image. This is several times as fast;
    pixels differ slightly. false: pixels as by a full decode, resize and crop. Unset: true, unless
    a pretrained tower names its image processor."""
    max_decoded_mib: float = Field(512.0, gt=0)
    """Largest memory in MiB for decoding an image and converting its colors, computed from the
    file's header. A larger image is a bad sample."""
    version: Literal[1, 2] = 2
    """Version of the steps from file to pixels; see "Pixels" in docs/data.md. A run keeps the
    version it began with; run folders without this key have version 1."""

    @property
    def members(self) -> tuple[str, ...]:
        """Possible extensions of the image's member, in the order in which they are tried."""
        return IMAGE_MEMBERS if self.member is None else (self.member.lower(),)

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        for name in ("mean", "std", "fill"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.channels:
                raise ValueError(
                    f"data.image.{name}: {len(value)} numbers for {self.channels} channels; give "
                    "one number, or one per channel"
                )
        if min(_as_tuple(self.std)) <= 0:
            raise ValueError("data.image.std: must be above 0")
        if not all(0 <= value <= 255 for value in _as_tuple(self.fill)):
            raise ValueError("data.image.fill: must be from 0 to 255")
        if self.version == 1:
            for name in ("resize", "interpolation", "crop", "fill", "max_decoded_mib"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"data.image.{name}: has no effect with data.image.version=1")
        return self


def _as_tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def normalize(pixels: Tensor, settings: ImageSettings) -> Tensor:
    """Subtract `mean` and divide by `std`, both per channel.

    Args:
        pixels: float32 [B, C, S, S] in [0, 1].
        settings: Mean and standard deviation.

    Returns:
        float32 [B, C, S, S].
    """
    mean, std = (
        pixels.new_tensor(value).view(-1, 1, 1) if isinstance(value, tuple) else value
        for value in (settings.mean, settings.std)
    )
    return (pixels - mean) / std


def decode_image(data: bytes, settings: ImageSettings, where: str) -> Tensor:
    """Decode a PNG, JPEG or WebP image; transparent pixels become white.

    Args:
        data: Contents of the file.
        settings: The steps, the size and the channels.
        where: Name of the sample, for error messages.

    Returns:
        uint8 [C, S, S], a view of memory laid out as [S, S, C].

    Raises:
        BadSample: if the image cannot be decoded, or would take more than `max_decoded_mib`.
    """
    size, mode = settings.size, "L" if settings.channels == 1 else "RGB"
    try:
        if settings.version == 1:
            image = images_v1.decode_square(data, size, mode, settings.draft is not False)
        else:
            image = _decode_square(data, settings, mode)
    except TooLarge as error:
        raise BadSample(
            f"{where}: the image is too large: {error}, more than data.image.max_decoded_mib="
            f"{settings.max_decoded_mib:g}. Raise it, or remove the sample."
        ) from error
    except Exception as error:  # Pillow raises many types, even AssertionError
        raise BadSample(
            f"{where}: the image cannot be decoded: {explain_failure(data, FORMATS, error)}. "
            "Restore or remove the sample."
        ) from error
    pixels = np.array(image, dtype=np.uint8).reshape(size, size, settings.channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_square(data: bytes, settings: ImageSettings, mode: str) -> Image.Image:
    """Return an image as a viewer shows it, in the color mode and size that towers see."""
    least = {}
    if settings.draft is not False:
        least = {"longer" if settings.resize == "pad" else "shorter": settings.size}
    upright = decode_upright(data, mode, settings.max_decoded_mib, **least)
    return _to_square(upright, settings)


def _to_square(upright: Upright, settings: ImageSettings) -> Image.Image:
    """Resize an image to a square."""
    side, filter = settings.size, _FILTERS[settings.interpolation]
    image, (width, height) = upright.image, upright.size
    short, long = min(width, height), max(width, height)
    if settings.resize == "squash" or short == long:
        if image.size == (side, side):
            return image
        return image.resize((side, side), filter, box=(*upright.begin, *upright.end))
    is_wide = width > height
    if settings.resize == "pad":
        other = max(1, int(side * short / long))
        inner = (side, other) if is_wide else (other, side)
        image = image.resize(inner, filter, box=(*upright.begin, *upright.end))
        square = Image.new(image.mode, (side, side), settings.fill)
        square.paste(image, ((side - inner[0]) // 2, (side - inner[1]) // 2))
        return square
    other = int(side * long / short)
    return _resize_and_crop(upright, (other, side) if is_wide else (side, other), settings)


def _resize_and_crop(
    upright: Upright, resized: tuple[int, int], settings: ImageSettings
) -> Image.Image:
    """Return the center of the image that a resize to `resized` would give."""
    side, filter = settings.size, _FILTERS[settings.interpolation]
    left, top = (_crop_offset(length - side, settings.crop) for length in resized)
    is_exact = settings.draft is False or settings.interpolation == "nearest"
    if is_exact and math.prod(resized) <= 16 * side * side:
        # Pillow orders its two passes by the shape of the result, and rounds between them.
        whole = upright.image.resize(resized, filter, box=(*upright.begin, *upright.end))
        # A crop: `Image.crop` applies Pillow's own limit on pixels.
        area = (left, top, left + side, top + side)
        return whole.resize((side, side), Image.Resampling.NEAREST, box=area)
    # Resize only the square: an image of 1 x 60,000 pixels would take gigabytes, and decoding an
    # image of 4 x 3 is a fifth faster. The filter still sees pixels beyond the box, but rounding
    # differs: by up to 16 of 255 in binary noise.
    box = []
    for first, length, begin, end in zip(
        (left, top), resized, upright.begin, upright.end, strict=True
    ):
        scale = (end - begin) / length
        box += [begin + first * scale, min(end, begin + (first + side) * scale)]
    part = (box[0], box[2], box[1], box[3])
    return upright.image.resize((side, side), filter, box=part)


def _crop_offset(surplus: int, crop: str) -> int:
    return round(surplus / 2) if crop == "torchvision" else surplus // 2
