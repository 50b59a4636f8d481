"""Version 1 of the steps from an image file to pixels, for runs that began with it.

Old runs resume bit for bit, so nothing here may change. `images.py` has the current version.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")


def decode_square(data: bytes, size: int, mode: str, draft: bool) -> Image.Image:
    """Decode an image as stored, without its EXIF orientation, to size x size pixels.

    Args:
        data: Contents of a PNG, JPEG or WebP file.
        size: Side length in pixels.
        mode: Pixel mode of the result: `L` or `RGB`.
        draft: Decode a large JPEG at a reduced scale.

    Raises:
        Exception: any, if the image cannot be decoded.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        if draft:
            file.draft("RGB", (size, size))
        if file.has_transparency_data:
            white = Image.new("RGBA", file.size, (255, 255, 255, 255))
            image: Image.Image = Image.alpha_composite(white, file.convert("RGBA"))
        else:
            image = file
        if image.mode.startswith("I"):  # 16 bits per pixel, which `convert` would clip
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        image.load()
        image = image if image.mode == mode else image.convert(mode)
        return _resize_and_crop(image, size)


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
