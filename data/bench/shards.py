"""Write shards of synthetic photographs, so that a benchmark needs no data.

An image is a few shapes under noise with a 1/f spectrum, like that of photographs. Its JPEG
therefore has the size and the decoding cost of a photograph's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from gigabatch.data.errors import GigabatchError

SHARDS, QUALITY = 8, 75
WORDS = """
a the small old red blue bright empty wooden quiet house river garden street window table dog bird
horse child boat bridge market mountain field with under beside over near and two three many flowers
people clouds lamps books stones in at before morning night rain snow
"""
_SIDE, _SHEETS = 1024, 6
"""Side in pixels and number of the noise images from which crops are taken."""


@dataclass(frozen=True)
class Kind:
    """A kind of synthetic image.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        noise: Range of the noise's standard deviation; pixel values go up to 255.
        samples: Default number of samples.
    """

    width: int
    height: int
    noise: tuple[float, float]
    samples: int


KINDS = {"8k": Kind(224, 160, (16, 24), 8192), "200k": Kind(1000, 750, (24, 36), 1024)}


def synthesize(folder: Path, kind: str, samples: int | None = None) -> None:
    """Write shards of JPEGs with captions and json members; the same call writes the same bytes.

    Args:
        folder: Output folder; created if needed.
        kind: "8k" or "200k", for JPEGs of about 8 KB or 200 KB.
        samples: Number of samples; None uses the default of the kind.

    Raises:
        GigabatchError: if the kind is unknown, or `samples` is less than 1.
    """
    if kind not in KINDS:
        raise GigabatchError(f"unknown kind of images {kind!r}; choose {' or '.join(KINDS)}.")
    count = KINDS[kind].samples if samples is None else samples
    if count < 1:
        raise GigabatchError(f"cannot write {count} samples; specify 1 or more.")
    folder.mkdir(parents=True, exist_ok=True)
    generator = _samples(KINDS[kind], count)
    per_shard = math.ceil(count / SHARDS)
    for shard in range(math.ceil(count / per_shard)):
        with wds.TarWriter(str(folder / f"{kind}-{shard:03d}.tar"), mtime=0) as writer:
            for sample in islice(generator, per_shard):
                writer.write(sample)


def _samples(kind: Kind, count: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    sheets = np.stack([_noise_sheet(random) for _ in range(_SHEETS)])
    for number in range(count):
        jpeg = BytesIO()
        _image(random, sheets, kind).save(jpeg, "JPEG", quality=QUALITY)
        words = random.choice(WORDS.split(), random.integers(6, 16))
        yield {
            "__key__": f"{number:06d}",
            "jpg": jpeg.getvalue(),
            "txt": " ".join(words),
            "json": {"number": number, "concept": number % 1000},
        }


def _noise_sheet(random: np.random.Generator) -> NDArray[np.float32]:
    """Generate 1/f noise [_SIDE, _SIDE] with mean 0 and standard deviation 1."""
    frequency = np.fft.fftfreq(_SIDE)
    radius = np.hypot(frequency[:, None], frequency)
    radius[0, 0] = np.inf
    noise = np.fft.ifft2(np.fft.fft2(random.standard_normal((_SIDE, _SIDE))) / radius).real
    return (noise / noise.std()).astype(np.float32)


def _image(random: np.random.Generator, sheets: NDArray[np.float32], kind: Kind) -> Image.Image:
    width, height = kind.width, kind.height
    image = Image.new("RGB", (width, height), _color(random))
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(3, 9)):
        x, y = random.integers(width), random.integers(height)
        across, down = random.integers(width // 20, width // 4, 2)
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x - across, y - down, x + across, y + down), fill=_color(random))
    pixels = np.array(image, np.float32)
    light, red, blue = (_noise_crop(random, sheets, width, height) for _ in range(3))
    deviation = random.uniform(*kind.noise)
    pixels += deviation * light[..., None]
    pixels[..., 0] += deviation / 5 * red
    pixels[..., 2] += deviation / 5 * blue
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _noise_crop(
    random: np.random.Generator, sheets: NDArray[np.float32], width: int, height: int
) -> NDArray[np.float32]:
    """Crop [height, width] from a random sheet at a random position."""
    top, left = random.integers(_SIDE - height), random.integers(_SIDE - width)
    return sheets[random.integers(_SHEETS), top : top + height, left : left + width]


def _color(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = random.integers(30, 226, 3).tolist()
    return red, green, blue
