"""Decode image, array and json members. Nothing here unpickles or starts a program."""

from __future__ import annotations

import io
import json
import math
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from gigabatch.data.errors import BadSample
from gigabatch.data.rng import key
from gigabatch.data.settings import Settings

IMAGE_MEMBERS = ("png", "jpg", "jpeg", "webp")
FORMATS = ("PNG", "JPEG", "WEBP")
Array = np.ndarray[Any, Any]


class ImageSettings(Settings):
    """Size, channels and normalization of images."""

    size: int = Field(224, ge=8)
    """Side length in pixels: the shorter side is resized to it, then the center is cropped."""
    channels: Literal[1, 3] = 3
    """Color channels: 3 for RGB, 1 for gray."""
    mean: float = 0.5
    """Value subtracted from pixels in [0, 1], the same for all channels."""
    std: float = Field(0.5, gt=0)
    """Value that pixels are divided by after `mean` is subtracted."""


def decode_image(data: bytes, settings: ImageSettings, where: str) -> Tensor:
    """Decode a PNG, JPEG or WebP image; transparent pixels become white.

    Args:
        data: Contents of the file.
        settings: Size and channels.
        where: Name of the sample, for error messages.

    Returns:
        uint8 [C, S, S], a view of memory laid out as [S, S, C].

    Raises:
        BadSample: if the image cannot be decoded.
    """
    size = settings.size
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            file.draft("RGB", (size, size))  # decodes a JPEG at a reduced scale; else no effect
            if file.has_transparency_data:
                white = Image.new("RGBA", file.size, (255, 255, 255, 255))
                image: Image.Image = Image.alpha_composite(white, file.convert("RGBA"))
            else:
                image = file
            if image.mode.startswith("I"):  # 16 bits per pixel, which `convert` would clip
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            mode = "L" if settings.channels == 1 else "RGB"
            image.load()
            image = image if image.mode == mode else image.convert(mode)
            image = _resize_and_crop(image, size)
    except Exception as error:  # Pillow raises many types, even AssertionError
        raise BadSample(
            f"{where}: the image cannot be decoded: {error or type(error).__name__}. Restore or "
            "remove the sample."
        ) from error
    pixels = np.array(image, dtype=np.uint8).reshape(size, size, settings.channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and crop the center."""
    if image.size == (size, size):
        return image
    box = []
    for length in image.size:
        resized = max(size, round(length * size / min(image.size)))
        first = (resized - size) // 2
        box.append((first * length / resized, min(length, (first + size) * length / resized)))
    (left, right), (top, bottom) = box
    # Resize only the square: an image of 1 x 60,000 pixels would take gigabytes.
    area = (left, top, right, bottom)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=area)


def decode_array(data: bytes, where: str) -> Tensor:
    """Decode a .npy member of numbers or booleans, without unpickling.

    Args:
        data: Contents of the member.
        where: Name of the sample, for error messages.

    Returns:
        The array as a tensor of the same shape and dtype.

    Raises:
        BadSample: if the member cannot be read.
    """
    try:
        return torch.from_numpy(load_array(data, where))
    except TypeError as error:
        raise BadSample(f"{where}: the .npy member cannot be read: {error}.") from error


def load_array(data: bytes, where: str) -> Array:
    """Return the array of a .npy member in this machine's byte order.

    Raises:
        BadSample: if the member cannot be read.
    """
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, MemoryError) as error:
        raise BadSample(f"{where}: the .npy member cannot be read: {error}.") from error


def _json_field(data: bytes, name: str, where: str) -> Any:
    """Return a field of a json member; None if it is missing."""
    try:
        record: Any = json.loads(data)
    except ValueError as error:
        raise BadSample(f"{where}: the json member cannot be read: {error}.") from error
    return record.get(name) if isinstance(record, dict) else None


def decode_column(data: bytes, column: str, where: str) -> int:
    """Return the integer code of a field of a json member; see `code_of`.

    Args:
        data: Contents of the json member.
        column: Name of the field.
        where: Name of the sample, for error messages.

    Raises:
        BadSample: if the json cannot be read or lacks the field.
    """
    value = _json_field(data, column, where)
    if value is None:  # unknown values are not equal to each other
        raise BadSample(
            f"{where}: its json member has no {column!r}. Set objective.positives "
            "(`gigabatch eval`: --positives FIELD, or none) to a field that every sample has."
        )
    return code_of(value)


def decode_number(data: bytes, column: str, where: str) -> float:
    """Return a finite number from a json member.

    Args:
        data: Contents of the json member.
        column: Name of the field.
        where: Name of the sample, for error messages.

    Raises:
        BadSample: if the json cannot be read or the field is not a finite number.
    """
    value = _json_field(data, column, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadSample(f"{where}: {column!r} of its json member is not a number: {value!r}.")
    return float(value)


def code_of(value: Any) -> int:
    """Return an integer up to 62 bits unchanged, and a 63-bit hash of any other json value."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62:
        return value
    return key("column", json.dumps(value, sort_keys=True)) >> 1
