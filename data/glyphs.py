"""`demo:glyphs`: an image-text set rendered from the fonts that matplotlib ships.

An image shows one character of one typeface; its caption is the character's Unicode name. Splits:

- `train`: the twelve DejaVu text faces.
- `val-face`: the same characters in STIXGeneral, a typeface absent from `train`.
- `val-concept`: 5 % of the characters, in all thirteen faces, absent from `train`.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import webdataset as wds
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key, permute
from gigabatch.data.shards.index import cache_folder

log = logging.getLogger(__name__)
NAME = "demo:glyphs"
VERSION = 1
IMAGE_SIZE = 32  # side length in pixels
INK_SIZE = 26  # longer side of a character in pixels
HELD_OUT_SHARE = 0.05  # fraction of the code points absent from `train`
SHARD_SAMPLES = 4096
UNSEEN_FACE = "STIXGeneral"


def glyphs_root() -> Path:
    """Return the folder of the demo set; the first call renders it (about 30 s, 60 MB).

    Raises:
        GigabatchError: if the cache folder cannot be written.
    """
    root = cache_folder() / f"glyphs-v{VERSION}"
    if root.is_dir():
        return root
    log.info("rendering the demo set into %s", root)
    temporary = root.with_name(f"{root.name}.{os.getpid()}.tmp")
    try:
        _write_set(temporary)
        os.rename(temporary, root)
    except OSError as error:
        if not root.is_dir():  # otherwise another process has written it
            raise GigabatchError(
                f"{root}: cannot write the demo set: {error}. Set GIGABATCH_CACHE to a folder "
                "with 100 MB free."
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _write_set(root: Path) -> None:
    """Render all faces and write the three splits."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = sorted(p for p in fonts.glob("DejaVu*.ttf") if "Display" not in p.stem)
    samples = [s for face in [*faces, fonts / f"{UNSEEN_FACE}.ttf"] for s in _render(face)]
    points = sorted({s["json"]["codepoint"] for s in samples if s["json"]["face"] != UNSEEN_FACE})
    ranks = permute(np.arange(len(points)), len(points), key("glyphs", VERSION, "held out"))
    limit = HELD_OUT_SHARE * len(points)
    held_out = {p for p, rank in zip(points, ranks, strict=True) if rank < limit}
    in_train = set(points) - held_out
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val-face": [], "val-concept": []}
    for sample in samples:
        if sample["json"]["codepoint"] in held_out:
            splits["val-concept"].append(sample)
        elif sample["json"]["face"] != UNSEEN_FACE:
            splits["train"].append(sample)
        elif sample["json"]["codepoint"] in in_train:
            splits["val-face"].append(sample)
    for name, rows in splits.items():
        _write_shards(root / name, rows)


def _write_shards(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write one split, shuffled."""
    folder.mkdir(parents=True)
    # Shuffle, so that every shard contains all faces and a run's window of shards mixes them fully.
    order = np.argsort(permute(np.arange(len(rows)), len(rows), key("glyphs", folder.name)))
    for shard, first in enumerate(range(0, len(rows), SHARD_SAMPLES)):
        with wds.TarWriter(str(folder / f"{folder.name}-{shard:05d}.tar"), mtime=0) as writer:
            for i in order[first : first + SHARD_SAMPLES]:
                writer.write(rows[i])


def _render(face: Path) -> Iterator[dict[str, Any]]:
    """Yield one webdataset sample for each named, visible character of a face."""
    cmap = TTFont(face, lazy=True).getBestCmap()
    fonts = _FontSizes(face)
    for point in sorted(cmap):
        name = unicodedata.name(chr(point), "")
        image = _draw(chr(point), fonts) if name else None
        if image is None:
            continue
        png = io.BytesIO()
        image.save(png, "png", compress_level=1)
        yield {
            "__key__": f"{face.stem.lower()}_{point:05x}",
            "png": png.getvalue(),
            "txt": name,
            "json": {
                "codepoint": point,
                "face": face.stem,
                "category": unicodedata.category(chr(point)),
                "script": name.split(" ")[0],
            },
        }


class _FontSizes(dict[int, ImageFont.FreeTypeFont]):
    """Fonts of one face by size, each opened on first use."""

    def __init__(self, face: Path) -> None:
        self.face = str(face)

    def __missing__(self, size: int) -> ImageFont.FreeTypeFont:
        engine = ImageFont.Layout.BASIC  # the default engine rejects some code points
        self[size] = ImageFont.truetype(self.face, size, layout_engine=engine)
        return self[size]


def _draw(character: str, fonts: _FontSizes) -> Image.Image | None:
    """Draw a character black on white, centered, INK_SIZE long; None if it leaves no ink."""
    left, top, right, bottom = fonts[100].getbbox(character, anchor="ls")
    if right <= left or bottom <= top:
        return None
    font = fonts[min(max(5, int(100 * INK_SIZE / max(right - left, bottom - top))), 64)]
    left, top, right, bottom = font.getbbox(character, anchor="ls")
    origin = (round((IMAGE_SIZE - right - left) / 2), round((IMAGE_SIZE - bottom - top) / 2))
    image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 255)
    ImageDraw.Draw(image).text(origin, character, font=font, fill=0, anchor="ls")
    return None if image.getextrema() == (255, 255) else image
