"""Write pixel_references.npz: images, and what torchvision and Hugging Face make of them.

Neither is a dependency of the tests. To regenerate, in an environment with torchvision:

    python tests/data/decode/write_pixel_references.py

Images that Pillow reads right are opened, turned by `ImageOps.exif_transpose` and converted to RGB
by Pillow. Transparent and 16-bit images start from the array that was written to the file, in
float64. Both continue as PIL images through `torchvision.transforms` and the PIL processors of
transformers.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

SIZE = 20
Array = np.ndarray[Any, Any]
Case = tuple[bytes, Array | None]
"""File, and the upright pixels float64 [H, W, 3] in [0, 255] if Pillow does not read it right."""


def texture(width: int, height: int, seed: int = 0, channels: int = 3) -> Array:
    """Return rectangles of random colors, uint8 [H, W, C]: sharp edges that compress well."""
    rng = np.random.default_rng([width, height, seed])
    image = np.full((height, width, channels), rng.integers(0, 256, channels), np.uint8)
    for _ in range(40):
        left, top = rng.integers(0, width), rng.integers(0, height)
        right, bottom = (
            left + rng.integers(1, width // 2 + 2),
            top + rng.integers(1, height // 2 + 2),
        )
        image[top:bottom, left:right] = rng.integers(0, 256, channels)
    return image


def saved(image: Image.Image | Array, format: str = "png", **options: Any) -> bytes:
    """Return the file of an image."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, format, **options
    )
    return file.getvalue()


def png(rows: Array, depth: int, kind: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a PNG of layouts that Pillow does not write.

    Args:
        rows: uint8 [H, bytes per row], packed.
        depth: Bits per channel.
        kind: PNG color type.
        before: Chunks before the pixels.
        after: Chunks after the pixels.
    """
    width = rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 4: 2, 6: 4}[kind])
    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    raw = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # a filter byte of 0 before each row
    parts = [chunk(b"IHDR", header), before, chunk(b"IDAT", zlib.compress(raw, 9)), after]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def wide(values: Array) -> Array:
    """Return 16-bit values [H, W, C] as rows of a PNG, uint8 [H, 2 W C]."""
    return values.astype(">u2").reshape(len(values), -1).view(np.uint8)


def exif(value: int) -> bytes:
    """Return EXIF data with an orientation."""
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = value
    return data.tobytes()


def on_white(colors: Array, alpha: Array) -> Array:
    """Return float64 [H, W, 3]; `alpha` [H, W] is in [0, 1]."""
    colors = np.broadcast_to(colors.astype(float), (*alpha.shape, 3))
    return colors * alpha[..., None] + 255 * (1 - alpha[..., None])


def cases() -> dict[str, Case]:
    """Return all images by name."""
    sizes = [(61, 43), (43, 61), (97, 64), (100, 59), (33, 100), (17, 16), (31, 29), (7, 90),
             (5, 3), (20, 20), (20, 33), (250, 187), (500, 375)]  # fmt: skip
    images: dict[str, Case] = {f"RGB {w}x{h}": (saved(texture(w, h)), None) for w, h in sizes}
    images |= {
        f"JPEG {w}x{h}": (saved(texture(w, h), "jpeg", quality=90), None)
        for w, h in ((97, 64), (151, 100))
    }
    images["JPEG progressive"] = saved(texture(83, 60), "jpeg", progressive=True), None
    images["JPEG gray"] = saved(texture(47, 70)[..., 0], "jpeg"), None
    images["JPEG CMYK"] = saved(Image.fromarray(texture(55, 40)).convert("CMYK"), "jpeg"), None
    images["WebP"] = saved(texture(71, 52), "webp", quality=80), None
    for value in range(1, 9):
        images[f"JPEG orientation {value}"] = (
            saved(texture(61, 43, value), "jpeg", quality=90, exif=exif(value)), None,
        )  # fmt: skip
    upright = np.rot90(texture(61, 43, 6), -1).astype(float)
    images["PNG orientation 6"] = saved(texture(61, 43, 6), exif=exif(6)), upright
    late = chunk(b"eXIf", exif(6).removeprefix(b"Exif\0\0"))
    rows = texture(61, 43, 6).reshape(43, -1)
    images["PNG orientation 6 after the pixels"] = png(rows, 8, 2, after=late), upright
    images["WebP orientation 8"] = saved(texture(52, 71), "webp", lossless=True, exif=exif(8)), None
    images |= _gray_and_palette() | _transparent() | _deep()
    return images


def _gray_and_palette() -> dict[str, Case]:
    palette = Image.fromarray(texture(61, 43)).quantize(16)
    colors, index = np.array(palette.convert("RGB")), np.array(palette)
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    gray = texture(61, 43)[..., 0]
    bits = Image.fromarray(gray).convert("1")
    on = np.array(bits).astype(float)
    fours, twos = texture(62, 43, 1)[..., 0] >> 4, texture(64, 43, 2)[..., 0] >> 6
    packed_fours = fours[:, ::2] << 4 | fours[:, 1::2]
    packed_twos = sum(twos[:, n::4] << 6 - 2 * n for n in range(4))
    key = chunk(b"tRNS", struct.pack(">H", int(fours[21, 31])))
    key_2 = chunk(b"tRNS", struct.pack(">H", int(twos[21, 31])))
    return {
        "L": (saved(gray), None),
        "L transparent": (
            saved(gray, transparency=int(gray[21, 30])),
            on_white(gray[..., None], gray != gray[21, 30]),
        ),
        "P": (saved(palette), None),
        "P transparent": (
            saved(palette, transparency=int(index[21, 30])),
            on_white(colors, index != index[21, 30]),
        ),
        "P with alpha": (
            saved(palette, transparency=levels.tobytes()),
            on_white(colors, levels[index] / 255),
        ),
        "1": (saved(bits), None),
        "1 transparent": (saved(bits, transparency=0), on_white(255 * on[..., None], on > 0)),
        "4-bit gray": (png(packed_fours, 4, 0), None),
        "4-bit gray transparent": (
            png(packed_fours, 4, 0, key),
            on_white(17 * fours[..., None], fours != fours[21, 31]),
        ),
        "2-bit gray transparent": (
            png(packed_twos, 2, 0, key_2),
            on_white(85 * twos[..., None], twos != twos[21, 31]),
        ),
    }


def _transparent() -> dict[str, Case]:
    four = texture(61, 43, 3, channels=4)
    two = texture(45, 80, 4, channels=2)
    colors = on_white(four[..., :3], four[..., 3] / 255)
    key = texture(61, 43)[21, 30]
    return {
        "RGBA": (saved(four), colors),
        "WebP with alpha": (saved(four, "webp", lossless=True, exact=True), colors),
        "LA": (
            saved(Image.fromarray(two)), on_white(two[..., :1], two[..., 1] / 255),
        ),
        "RGB transparent": (
            saved(texture(61, 43), transparency=tuple(map(int, key))),
            on_white(texture(61, 43), (texture(61, 43) != key).any(-1)),
        ),
    }  # fmt: skip


def _deep() -> dict[str, Case]:
    """Return 16-bit images. Neighbors of the transparent value differ from it in the low byte."""
    values = texture(61, 43, 5, channels=4).astype(np.uint16) * 256
    values += texture(61, 43, 6, channels=4)
    values[:, :20, :3] = values[21, 30, :3] ^ 1
    gray, colors, alpha = values[..., 0], values[..., :3], values[..., 3]
    high = (colors >> 8).astype(float)
    high_gray = high[..., :1]
    gray_key = chunk(b"tRNS", struct.pack(">H", int(gray[21, 30])))
    key = chunk(b"tRNS", struct.pack(">3H", *map(int, colors[21, 30])))
    return {
        "16-bit gray": (png(wide(gray), 16, 0), np.repeat(high_gray, 3, -1)),
        "16-bit gray transparent": (
            png(wide(gray), 16, 0, gray_key), on_white(high_gray, gray != gray[21, 30]),
        ),
        "16-bit gray with alpha": (
            png(wide(values[..., [0, 3]]), 16, 4), on_white(high_gray, (alpha >> 8) / 255),
        ),
        "16-bit RGB": (png(wide(colors), 16, 2), high),
        "16-bit RGB transparent": (
            png(wide(colors), 16, 2, key), on_white(high, (colors != colors[21, 30]).any(-1)),
        ),
        "16-bit RGBA": (png(wide(values), 16, 6), on_white(high, (alpha >> 8) / 255)),
    }  # fmt: skip


def upright_image(data: bytes, expected: Array | None) -> Image.Image:
    """Return the image that torchvision's and Hugging Face's transforms start from."""
    if expected is not None:
        return Image.fromarray(np.rint(expected).astype(np.uint8))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert turned is not None
    return turned.convert("RGB")


def main() -> None:
    """Write the file beside this script."""
    from torchvision.transforms import InterpolationMode, v2
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    as_read = {"do_rescale": False, "do_normalize": False}
    square = {"height": SIZE, "width": SIZE}
    clip = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square, **as_read)
    siglip = {
        name: SiglipImageProcessorPil(size=square, resample=resample, **as_read)
        for name, resample in (("bicubic", 3), ("bilinear", 2))
    }

    def by_torchvision(name: str, image: Image.Image) -> Array:
        resize = v2.Resize(SIZE, InterpolationMode(name))
        return np.asarray(v2.CenterCrop(SIZE)(resize(image)))

    def padded(image: Image.Image) -> Array:
        longest = v2.Resize(None, InterpolationMode.BICUBIC, max_size=SIZE)
        return np.asarray(v2.CenterCrop(SIZE)(longest(image)))

    def by_transformers(processor: Any, image: Image.Image) -> Array:
        pixels = processor(image, return_tensors="np")["pixel_values"][0]
        return np.asarray(pixels).transpose(1, 2, 0).astype(np.uint8)

    files = cases()
    uprights = [upright_image(*case) for case in files.values()]
    results = {
        "torchvision": [by_torchvision("bicubic", image) for image in uprights],
        "huggingface": [by_transformers(clip, image) for image in uprights],
    }
    few = uprights[:13]
    results |= {
        "bilinear": [by_torchvision("bilinear", image) for image in few],
        "lanczos": [by_torchvision("lanczos", image) for image in few],
        "nearest": [by_torchvision("nearest", image) for image in few],
        "pad": [padded(image) for image in few],
        "squash": [by_transformers(siglip["bicubic"], image) for image in few],
        "squash bilinear": [by_transformers(siglip["bilinear"], image) for image in few],
    }
    np.savez_compressed(
        Path(__file__).with_name("pixel_references.npz"),
        names=np.array(list(files)),
        lengths=np.array([len(data) for data, _ in files.values()]),
        files=np.frombuffer(b"".join(data for data, _ in files.values()), np.uint8),
        **{name: np.stack(pixels) for name, pixels in results.items()},
    )


if __name__ == "__main__":
    main()
