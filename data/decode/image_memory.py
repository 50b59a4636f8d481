"""Open image files and bound the memory of decoding them, from their headers."""

from __future__ import annotations

import io

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

FORMATS = ("PNG", "JPEG", "WEBP")
_PLUGINS = (PngImagePlugin, JpegImagePlugin, WebPImagePlugin)
"""Imported because each registers its format in `Image.OPEN`."""
_MIB = 1 << 20


class TooLarge(Exception):
    """An image would take more memory than allowed; the message starts with its size."""


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open a PNG, JPEG or WebP file and decode its header only.

    Unlike `Image.open`, this has no limit of its own on the number of pixels, which warns at one
    size and raises at another: `check_memory` is the limit.

    Raises:
        ValueError: if the contents are of no such format.
        Exception: any other, if the header is damaged.
    """
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is None or accepts(data[:16]) is True:
            return factory(io.BytesIO(data), "")
    raise ValueError("not a PNG, JPEG or WebP file")


def check_memory(
    file: ImageFile.ImageFile, data: bytes, mode: str, max_mib: float, *, is_turned: bool = False
) -> None:
    """Check that an image, at the scale at which it will be decoded, is not too large.

    Args:
        file: Opened image.
        data: Its contents.
        mode: Pixel mode to which it will be converted: `L` or `RGB`.
        max_mib: Allowed memory in MiB.
        is_turned: Count a turned copy as well.

    Raises:
        TooLarge: if decoding and converting it takes more than `max_mib`.
    """
    width, height = file.size
    if _pixels(file) * _MOST_BYTES <= max_mib * _MIB:
        return
    needed = width * height * _bytes_per_pixel(file, mode, is_turned) + _coefficients(file, data)
    if needed > max_mib * _MIB:
        raise TooLarge(
            f"{width} x {height} pixels ({file.mode}) take {needed / _MIB:,.0f} MiB to decode"
        )


_MOST_BYTES = 32
"""More bytes per pixel of the file than any image takes: smaller images need no closer look."""


def _pixels(file: ImageFile.ImageFile) -> int:
    """Return the number of pixels of the file at its full scale."""
    if isinstance(file, JpegImagePlugin.JpegImageFile) and file.decoderconfig:
        scale = int(file.decoderconfig[0])
        return file.width * scale * file.height * scale
    return file.width * file.height


def _bytes_per_pixel(file: ImageFile.ImageFile, mode: str, is_turned: bool) -> int:
    """Return the bytes per pixel of all copies that exist at the same time."""
    converted = 1 if mode == "L" else 4  # Pillow pads a pixel of several channels to 4 bytes.
    if file.mode.startswith("I"):
        total = 8  # 16-bit values, two arrays of them, and their high bytes
    else:
        total = 1 if file.mode in ("1", "L", "P") else 4
    if file.format == "WEBP":
        total += 12  # two canvases of the decoder, and its output
    if file.has_transparency_data:
        total += 4 + converted
        if isinstance(file.info.get("transparency"), tuple):
            total += 12  # the transparent color is compared in up to 16 bits
    elif file.mode != mode:
        total += converted
    return total + converted * is_turned


def _coefficients(file: ImageFile.ImageFile, data: bytes) -> float:
    """Return the bytes that libjpeg keeps of a progressive or other JPEG of several scans.

    They are the coefficients of the whole image, at whatever scale it is decoded.
    """
    if not isinstance(file, JpegImagePlugin.JpegImageFile) or data.count(b"\xff\xda") < 2:
        return 0
    sampling = [(layer[1], layer[2]) for layer in file.layer]
    most = max(h for h, _ in sampling) * max(v for _, v in sampling)
    return 2 * _pixels(file) * sum(h * v for h, v in sampling) / most
