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

    Unlike `Image.open`, which warns or raises for many pixels, this has no limit: `check_memory`
    applies the one of the config.

    Raises:
        TooLarge: if a WebP file has more pixels than Pillow decodes.
        ValueError: if the contents are of no such format.
        Exception: any other, if the header is damaged.
    """
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is None or accepts(data[:16]) is True:
            try:
                return factory(io.BytesIO(data), "")
            except Image.DecompressionBombError as error:  # only Pillow's WebP decoder checks this
                pixels = 2 * (Image.MAX_IMAGE_PIXELS or 0)
                raise TooLarge(
                    f"over {pixels:,} pixels (WebP) take over {16 * pixels / _MIB:,.0f} MiB to "
                    "decode"
                ) from error
    raise ValueError("not a PNG, JPEG or WebP file")


def check_memory(
    file: ImageFile.ImageFile,
    data: bytes,
    size: tuple[int, int],
    mode: str,
    max_mib: float,
    *,
    is_turned: bool = False,
) -> None:
    """Check that an image, at the scale at which it will be decoded, is not too large.

    Args:
        file: Opened image, possibly to be decoded at a reduced scale.
        data: Its contents.
        size: Its width and height at full scale.
        mode: Pixel mode to which it will be converted: `L` or `RGB`.
        max_mib: Allowed memory in MiB.
        is_turned: Count a turned copy as well.

    Raises:
        TooLarge: if decoding and converting it takes more than `max_mib`.
    """
    width, height = size
    if width * height * _MOST_BYTES <= max_mib * _MIB:
        return
    needed = file.width * file.height * _bytes_per_pixel(file, mode, is_turned)
    needed += width * height * _coefficient_bytes(file, data)
    if needed > max_mib * _MIB:
        raise TooLarge(
            f"{width} x {height} pixels ({file.mode}) take {needed / _MIB:,.0f} MiB to decode"
        )


_MOST_BYTES = 32
"""More bytes per pixel of the file than any image takes: smaller images need no closer look."""


def _bytes_per_pixel(file: ImageFile.ImageFile, mode: str, is_turned: bool) -> int:
    """Return the bytes per pixel of all copies that exist at the same time."""
    converted = 1 if mode == "L" else 4  # Pillow pads a pixel of several channels to 4 bytes.
    if file.mode.startswith("I"):
        return 7 + converted * is_turned  # 16-bit values, two arrays of them, their high bytes
    total = 1 if file.mode in ("1", "L", "P") else 4
    if file.format == "WEBP":
        total += 12  # two canvases of the decoder, and its output
    if file.has_transparency_data:
        total += 4 if mode == "RGB" else 5  # in front of white, by strips
        if file.tile and file.tile[0].args == "RGB;16B":
            total += 12  # the low bytes, and arrays to compare both with the transparent color
    elif file.mode != mode:
        total += converted if file.mode != "CMYK" else 4 + converted * (mode == "L")
    return total + converted * is_turned


def _coefficient_bytes(file: ImageFile.ImageFile, data: bytes) -> int:
    """Return the bytes per pixel that libjpeg keeps of a progressive or other JPEG of many scans.

    They are the coefficients of the whole image, at whatever scale it is decoded.
    """
    if not isinstance(file, JpegImagePlugin.JpegImageFile) or data.count(b"\xff\xda") < 2:
        return 0
    sampling = [(layer[1], layer[2]) for layer in file.layer]
    most = max(h for h, _ in sampling) * max(v for _, v in sampling)
    return 2 * sum(h * v for h, v in sampling) // most
