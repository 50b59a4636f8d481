"""Steps from an image file to an upright, opaque image of 8 bits per channel."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile

from gigabatch.data.decode.image_memory import check_memory, open_image


class _Turn(NamedTuple):
    """Operation that turns a stored image as a viewer shows it.

    Attributes:
        method: Pillow's name of it.
        swaps: The stored height becomes the width.
        flips: For width and height of the result: it runs against the stored direction.
    """

    method: Image.Transpose
    swaps: bool
    flips: tuple[bool, bool]


_TURNS = {
    2: _Turn(Image.Transpose.FLIP_LEFT_RIGHT, False, (True, False)),
    3: _Turn(Image.Transpose.ROTATE_180, False, (True, True)),
    4: _Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, (False, True)),
    5: _Turn(Image.Transpose.TRANSPOSE, True, (False, False)),
    6: _Turn(Image.Transpose.ROTATE_270, True, (True, False)),
    7: _Turn(Image.Transpose.TRANSVERSE, True, (True, True)),
    8: _Turn(Image.Transpose.ROTATE_90, True, (False, True)),
}
"""EXIF orientation -> operation."""
_WITH_ORIENTATION = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
"""Entries of `info` from which Pillow reads the orientation."""
_STRIP_PIXELS = 1 << 20
"""Number of pixels that are put on white at a time, to keep copies of a large image small."""
_GRAY_LAYOUTS = {"L": (255, 1), "L;2": (3, 85), "L;4": (15, 17)}
"""Pillow's name of a gray layout -> mask of a value, and factor by which Pillow multiplies it."""


class Upright(NamedTuple):
    """An image as a viewer shows it.

    Attributes:
        image: The image, possibly at a reduced scale.
        size: Width and height at full scale.
        begin: Left and top of the part of `image` that shows the file. At a reduced scale, its
            last column and row may cover less than a pixel; a turn may make them the first.
        end: Right and bottom of that part.
    """

    image: Image.Image
    size: tuple[int, int]
    begin: tuple[float, float]
    end: tuple[float, float]


def decode_upright(
    data: bytes, mode: str, max_mib: float, *, shorter: int = 0, longer: int = 0
) -> Upright:
    """Decode an image as a viewer shows it, in front of white.

    Args:
        data: Contents of a PNG, JPEG or WebP file.
        mode: Pixel mode of the result: `L` or `RGB`.
        max_mib: Allowed memory in MiB.
        shorter: Needed length of the shorter side: libjpeg may reduce a JPEG to no less.
        longer: The same of the longer side. With neither, nothing is reduced.

    Raises:
        TooLarge: if decoding takes more than `max_mib`.
        Exception: any other, if the image cannot be decoded.
    """
    with open_image(data) as file:
        size = file.size
        end: tuple[float, float] = size
        if shorter or longer:
            width, height = shorter, shorter
            if longer:
                width, height = (max(1, side * longer // max(size)) for side in size)
            reduced = file.draft("RGB", (width, height))  # no effect except on a JPEG
            end = reduced[1][2:] if reduced else size
        check_memory(file, data, size, mode, max_mib)
        image = _opaque(file, data, mode)
        turn = _turn(file)
        if turn is None:
            return Upright(image, size, (0, 0), end)
        check_memory(file, data, size, mode, max_mib, is_turned=True)
        return _turned(image, size, end, turn)


def _turned(
    image: Image.Image, size: tuple[int, int], end: tuple[float, float], turn: _Turn
) -> Upright:
    image = image.transpose(turn.method)
    if turn.swaps:
        size, end = size[::-1], end[::-1]
    begin = [
        length - last if flips else 0
        for length, last, flips in zip(image.size, end, turn.flips, strict=True)
    ]
    right, bottom = (first + last for first, last in zip(begin, end, strict=True))
    return Upright(image, size, (begin[0], begin[1]), (right, bottom))


def _turn(file: ImageFile.ImageFile) -> _Turn | None:
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
