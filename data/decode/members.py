"""Bytes of members to tensors and values. Nothing here unpickles, and nothing runs a shell."""

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
    """The size and form of images."""

    size: int = Field(224, ge=8)
    """Pixels a side: the short side is resized to it, then the centre is cut out."""
    channels: Literal[1, 3] = 3
    """3: RGB. 1: grey."""
    mean: float = 0.5
    """Subtracted from pixels in [0, 1], all channels alike."""
    std: float = Field(0.5, gt=0)
    """Divides what remains."""


def decode_image(data: bytes, settings: ImageSettings, where: str) -> Tensor:
    """uint8 [C, S, S], a view of [S, S, C]. `where` names the sample in errors.

    Transparency is laid on white."""
    size = settings.size
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            file.draft("RGB", (size, size))  # JPEG: decode at a reduced scale; else no effect
            if file.has_transparency_data:
                back = Image.new("RGBA", file.size, (255, 255, 255, 255))
                image: Image.Image = Image.alpha_composite(back, file.convert("RGBA"))
            else:
                image = file
            if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            mode = "L" if settings.channels == 1 else "RGB"
            image.load()
            image = image if image.mode == mode else image.convert(mode)
            image = _fit(image, size)
    except Exception as error:  # Pillow answers odd files with whatever comes up, asserts too
        raise BadSample(
            f"{where}: the image cannot be decoded: {error or type(error).__name__}. Restore or "
            "remove the sample."
        ) from error
    pixels = np.array(image, dtype=np.uint8).reshape(size, size, settings.channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _fit(image: Image.Image, size: int) -> Image.Image:
    """The short side resized to `size`, the centre cut out."""
    if image.size == (size, size):
        return image
    box = []
    for length in image.size:
        resized = max(size, round(length * size / min(image.size)))
        first = (resized - size) // 2
        box.append((first * length / resized, min(length, (first + size) * length / resized)))
    (left, right), (top, bottom) = box
    # The square alone, not the whole image: one of 1 x 60,000 pixels would take gigabytes.
    area = (left, top, right, bottom)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=area)


def decode_array(data: bytes, where: str) -> Tensor:
    """A .npy member, of numbers or truth values. (A pickled one is refused, never opened.)"""
    try:
        return torch.from_numpy(load_array(data, where))
    except TypeError as error:
        raise BadSample(f"{where}: the .npy member cannot be read: {error}.") from error


def load_array(data: bytes, where: str) -> Array:
    """The array of a .npy member, in this machine's byte order."""
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
        return found.astype(found.dtype.newbyteorder("="), copy=False)
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, MemoryError) as error:
        raise BadSample(f"{where}: the .npy member cannot be read: {error}.") from error


def _field(data: bytes, column: str, where: str) -> Any:
    """What stands under `column` of a json member; None where there is nothing."""
    try:
        tree: Any = json.loads(data)
    except ValueError as error:
        raise BadSample(f"{where}: the json member cannot be read: {error}.") from error
    return tree.get(column) if isinstance(tree, dict) else None


def decode_column(data: bytes, column: str, where: str) -> int:
    """The integer under `column` of a json member; any other value by its 63-bit hash."""
    value = _field(data, column, where)
    if value is None:  # unknown is not the same as equal
        raise BadSample(
            f"{where}: its json member has no {column!r}. Set objective.positives "
            "(`gigabatch eval`: --positives FIELD, or none) to a field that every sample has."
        )
    return code_of(value)


def decode_number(data: bytes, column: str, where: str) -> float:
    """The finite number under `column` of a json member."""
    value = _field(data, column, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadSample(f"{where}: {column!r} of its json member is no number: {value!r}.")
    return float(value)


def code_of(value: Any) -> int:
    """An integer as it is; any other value by its 63-bit hash."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62:
        return value
    return key("column", json.dumps(value, sort_keys=True)) >> 1
