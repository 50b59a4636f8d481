"""`demo:glyphs`: an image-text set made in seconds from the fonts that matplotlib ships.

An image is one character of one typeface; its caption is the character's Unicode name.
`train`: the twelve DejaVu text faces. `val-face`: the same characters in STIXGeneral, a typeface
never trained on. `val-concept`: 5 % of the characters, in all thirteen faces, seen in no training
image.
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
from gigabatch.data.shards.index import cache_home

log = logging.getLogger(__name__)
NAME = "demo:glyphs"
VERSION = 1
SIZE = 32  # pixels a side
INK = 26
HELD_OUT = 0.05  # of the code points
SHARD = 4096  # samples
UNSEEN_FACE = "STIXGeneral"


def glyphs_root() -> Path:
    """The folder of the demo set, made on first use (a few seconds, about 60 MB)."""
    root = cache_home() / f"glyphs-v{VERSION}"
    if root.is_dir():
        return root
    log.info("making the demo set in %s", root)
    fresh = root.with_name(f"{root.name}.{os.getpid()}.tmp")
    try:
        _write(fresh)
        os.rename(fresh, root)
    except OSError as error:
        if not root.is_dir():  # otherwise another process was first
            raise GigabatchError(
                f"{root}: the demo set cannot be written: {error}. Set GIGABATCH_CACHE to a folder "
                "with 100 MB free."
            ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return root


def _write(root: Path) -> None:
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = sorted(p for p in fonts.glob("DejaVu*.ttf") if "Display" not in p.stem)
    samples = [s for face in [*faces, fonts / f"{UNSEEN_FACE}.ttf"] for s in _render(face)]
    points = sorted({s["json"]["codepoint"] for s in samples if s["json"]["face"] != UNSEEN_FACE})
    ranks = permute(np.arange(len(points)), len(points), key("glyphs", VERSION, "held out"))
    held = {p for p, rank in zip(points, ranks, strict=True) if rank < HELD_OUT * len(points)}
    known = set(points) - held
    sets: dict[str, list[dict[str, Any]]] = {"train": [], "val-face": [], "val-concept": []}
    for sample in samples:
        if sample["json"]["codepoint"] in held:
            sets["val-concept"].append(sample)
        elif sample["json"]["face"] != UNSEEN_FACE:
            sets["train"].append(sample)
        elif sample["json"]["codepoint"] in known:
            sets["val-face"].append(sample)
    for name, rows in sets.items():
        _write_shards(root / name, rows)


def _write_shards(folder: Path, rows: list[dict[str, Any]]) -> None:
    # Shuffled once, so that a shard holds all faces: the run's own window is then a full mix.
    folder.mkdir(parents=True)
    order = np.argsort(permute(np.arange(len(rows)), len(rows), key("glyphs", folder.name)))
    for shard, first in enumerate(range(0, len(rows), SHARD)):
        with wds.TarWriter(str(folder / f"{folder.name}-{shard:05d}.tar"), mtime=0) as writer:
            for i in order[first : first + SHARD]:
                writer.write(rows[i])


def _render(face: Path) -> Iterator[dict[str, Any]]:
    """Each named character of a face that leaves ink."""
    cmap = TTFont(face, lazy=True).getBestCmap()
    fonts = _Sizes(face)
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


class _Sizes(dict[int, ImageFont.FreeTypeFont]):
    """One face, each size opened once. (The default layout engine refuses some code points.)"""

    def __init__(self, face: Path) -> None:
        self.face = str(face)

    def __missing__(self, size: int) -> ImageFont.FreeTypeFont:
        engine = ImageFont.Layout.BASIC
        self[size] = ImageFont.truetype(self.face, size, layout_engine=engine)
        return self[size]


def _draw(character: str, fonts: _Sizes) -> Image.Image | None:
    """Black on white, centred, scaled so that the longer side of its ink is INK pixels."""
    left, top, right, bottom = fonts[100].getbbox(character, anchor="ls")
    if right <= left or bottom <= top:
        return None
    font = fonts[min(max(5, int(100 * INK / max(right - left, bottom - top))), 64)]
    left, top, right, bottom = font.getbbox(character, anchor="ls")
    at = (round((SIZE - right - left) / 2), round((SIZE - bottom - top) / 2))
    image = Image.new("L", (SIZE, SIZE), 255)
    ImageDraw.Draw(image).text(at, character, font=font, fill=0, anchor="ls")
    return None if image.getextrema() == (255, 255) else image
