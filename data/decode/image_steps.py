"""Steps from an image file to an upright, opaque image of 8 bits per channel."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile

from gigabatch.data.decode.image_memory import check_memory, open_image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> operation that turns the stored image as a viewer shows it."""
_SWAPS_SIDES = (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])
"""Operations after which the width is the stored height."""
_WITH_ORIENTATION = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
"""Entries of `info` from which Pillow reads the orientation."""
_STRIP_PIXELS = 1 << 20
"""Number of pixels that are put on white at a time, to keep copies of a large image small."""
_GRAY_LAYOUTS = {"L": (255, 1), "L;2": (3, 85), "L;4": (15, 17)}
"""Pillow's name of a gray layout -> mask of a value, and factor by which Pillow multiplies it."""


def decode_upright(
    data: bytes, mode: str, max_mib: float, *, shorter: int = 0, longer: int = 0
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image as a viewer shows it, in front of white.

    Args:
        data: Contents of a PNG, JPEG or WebP file.
        mode: Pixel mode of the result: `L` or `RGB`.
        max_mib: Allowed memory in MiB.
        shorter: Needed length of the shorter side: libjpeg may reduce a JPEG to no less.
        longer: The same of the longer side. With neither, nothing is reduced.

    Returns:
        The image, and its width and height at full scale.

    Raises:
        TooLarge: if decoding takes more than `max_mib`.
        Exception: any other, if the image cannot be decoded.
    """
    with open_image(data) as file:
        size = file.size
        if shorter:
            file.draft("RGB", (shorter, shorter))  # no effect except on a JPEG
        elif longer:
            width, height = (max(1, side * longer // max(size)) for side in size)
            file.draft("RGB", (width, height))
        check_memory(file, data, mode, max_mib)
        image = _opaque(file, data, mode)
        turn = _turn(file)
        if turn is None:
            return image, size
        check_memory(file, data, mode, max_mib, is_turned=True)
        return image.transpose(turn), size[::-1] if turn in _SWAPS_SIDES else size


def _turn(file: ImageFile.ImageFile) -> Image.Transpose | None:
    """Return the operation that shows an image upright, or None if none is needed.

    The pixels must be loaded: a PNG may have its EXIF data after them.
    """
    if _WITH_ORIENTATION.isdisjoint(file.info):  # most images: `getexif` is slow
        return None
    try:
        value = file.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Viewers show an image with damaged EXIF data as it is stored.
        return None
    return _TURNS.get(value) if isinstance(value, int) else None


def _opaque(file: ImageFile.ImageFile, data: bytes, mode: str) -> Image.Image:
    """Load an image, reduce it to 8 bits per channel, put it on white, convert its colors.

    Args:
        file: Opened image.
        data: Its contents.
        mode: Pixel mode of the result: `L` or `RGB`.

    Returns:
        The image, as stored; it may share memory with `file`.
    """
    layout = _layout(file)
    file.load()
    image: Image.Image = file
    if file.mode.startswith("I"):
        image = _from_16_bit_gray(file)
    elif "transparency" in file.info and layout == "RGB;16B":
        image = _from_16_bit_colors(file, data)
    elif file.has_transparency_data:
        _scale_transparent_value(file, layout)
        image = _on_white(file)
    return image if image.mode == mode else image.convert(mode)


def _layout(file: ImageFile.ImageFile) -> str:
    """Return Pillow's name for the layout of a PNG's pixels; empty for other formats."""
    return str(file.tile[0].args) if file.format == "PNG" and file.tile else ""


# A PNG may name one transparent value, in the file's bit depth. Pixels are compared with it before
# their depth changes, as the PNG specification requires. Pillow compares afterwards.


def _from_16_bit_gray(file: ImageFile.ImageFile) -> Image.Image:
    values: np.ndarray[Any, np.dtype[np.uint16]] = np.asarray(file)
    gray = (values >> 8).astype(np.uint8)
    if "transparency" in file.info:
        gray[values == file.info["transparency"]] = 255
    return Image.fromarray(gray)


def _from_16_bit_colors(file: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Paint the transparent color of a 16-bit PNG white.

    Pillow keeps high bytes only. A second decode, as if the file were little-endian, has the low
    bytes.
    """
    key = np.array(file.info["transparency"], np.uint16)
    with open_image(data) as again:
        again.tile = [again.tile[0]._replace(args="RGB;16L")]
        is_transparent = (np.asarray(again) == key & 255).all(-1)
    pixels = np.array(file)
    is_transparent &= (pixels == key >> 8).all(-1)
    pixels[is_transparent] = 255
    return Image.fromarray(pixels)


def _scale_transparent_value(file: ImageFile.ImageFile, layout: str) -> None:
    """Scale the transparent gray value of a PNG as Pillow scales its pixels."""
    if layout in _GRAY_LAYOUTS and "transparency" in file.info:
        mask, factor = _GRAY_LAYOUTS[layout]
        file.info["transparency"] = (file.info["transparency"] & mask) * factor


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image of mode RGB: the given one in front of white."""
    width, height = image.size
    result = Image.new("RGB", image.size, "white")
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image if rows >= height else image.crop((0, top, width, min(height, top + rows)))
        if strip.mode != "RGBA":
            strip = strip.convert("RGBA")
        result.paste(strip, (0, top), strip)
    return result
