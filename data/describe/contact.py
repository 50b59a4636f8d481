"""Draw a contact sheet: one picture of samples of a set, with captions below the images.

The set is split into as many equal ranges as the sheet has cells; each cell shows a random sample
of its range. A crossed box with the reason replaces an image that cannot be shown.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gigabatch.data.decode.image_steps import decode_upright
from gigabatch.data.decode.images import IMAGE_MEMBERS, ImageSettings
from gigabatch.data.describe.content_stats import one_line
from gigabatch.data.errors import BadSample, GigabatchError
from gigabatch.data.files import atomic_replace
from gigabatch.data.rng import key, uniforms
from gigabatch.data.shards.index import I64, Index
from gigabatch.data.shards.reader import DamagedMember, Reader
from gigabatch.data.text.captions import CaptionSettings, read_captions

CELL, GAP, LINE, TITLE = 128, 12, 18, 30
"""Pixels: maximum side of an image, gap between cells, height of a caption and of the title."""
WRAP = 21
"""Maximum number of characters in a line of a crossed box."""
PAPER, FRAME, INK, ERROR = "#ffffff", "#d0d0d0", "#202020", "#c02020"


@dataclass(frozen=True)
class _Cell:
    """An RGB image with sides of at most CELL pixels, or None and the reason in `why`."""

    image: Image.Image | None
    why: str
    caption: str
    readable: bool


def contact_sheet(
    index: Index,
    captions: CaptionSettings,
    out: Path,
    columns: int = 8,
    rows: int = 6,
    seed: int = 0,
) -> None:
    """Write a contact sheet as PNG.

    Captions in scripts that DejaVu Sans lacks, such as Han, appear as boxes.

    Args:
        index: Set to show.
        captions: Caption to show below an image.
        out: File to write.
        columns: Number of cells in a row; fewer if the set has fewer samples.
        rows: Number of rows.
        seed: Seed for the choice of samples.

    Raises:
        GigabatchError: if the set has no images, or `out` cannot be written.
    """
    if not out.name or out.is_dir():
        raise GigabatchError(f"{out}: this is a folder. Specify a file name for the contact sheet.")
    kinds = index.require_members(*IMAGE_MEMBERS, allow_missing=True)
    texts = (captions.member,) if captions.member in index.members else ()
    chosen = _choose(len(index), columns * rows, seed)
    columns = min(columns, len(chosen))
    height = TITLE + -(-len(chosen) // columns) * (CELL + LINE + GAP)
    sheet = Image.new("RGB", (GAP + columns * (CELL + GAP), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = f"{index.name}: {len(chosen)} of {len(index):,} samples, seed {seed}"
    draw.text((GAP, TITLE / 2), _fit(title, sheet.width - 2 * GAP, 13), INK, _font(13), "lm")
    with Reader(index) as reader:
        for position, sample in enumerate(chosen.tolist()):
            raw = reader.read_batch(np.array([sample]), [*kinds, *texts])[0]
            cell = _cell(raw, kinds, captions if texts else None)
            row, column = divmod(position, columns)
            _paint(sheet, GAP + column * (CELL + GAP), TITLE + row * (CELL + LINE + GAP), cell)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(out) as temporary:
            sheet.save(temporary, "PNG")
    except OSError as error:
        raise GigabatchError(
            f"{out}: the contact sheet cannot be written: {error.strerror or error}. Choose "
            "a different file."
        ) from error


def _choose(size: int, cells: int, seed: int) -> I64:
    """Choose one sample from each of `cells` equal ranges of `size` samples, in order."""
    cells = min(cells, size)
    begin = np.arange(cells + 1) * size // cells
    fraction = uniforms(key(seed, "contact sheet"), 1, cells)[0]
    return begin[:-1] + (fraction * np.diff(begin)).astype(np.int64)


def _cell(
    raw: Mapping[str, bytes | DamagedMember],
    kinds: tuple[str, ...],
    captions: CaptionSettings | None,
) -> _Cell:
    """Build the cell of a sample; `captions` is None if the set has no captions."""
    member = next((name for name in kinds if name in raw), None)
    image, why = _picture(raw[member]) if member else (None, "no image")
    caption, readable = _caption(raw.get(captions.member), captions) if captions else ("", True)
    return _Cell(image, one_line(why), one_line(caption), readable)


def _picture(data: bytes | DamagedMember) -> tuple[Image.Image | None, str]:
    """Return the image, scaled to fit a cell, or None and the reason."""
    if isinstance(data, DamagedMember):
        return None, data.why[data.why.find("at byte ") :]  # Omit the shard: its path is long.
    try:
        upright = decode_upright(data, "RGB", ImageSettings().max_decoded_mib, longer=CELL)
    except Exception as error:  # Pillow raises many types
        return None, f"the image cannot be decoded: {str(error) or type(error).__name__}"
    size = upright.size
    width, height = (max(1, round(side * CELL / max(size))) for side in size)
    return upright.image.resize((width, height), Image.Resampling.BICUBIC), ""


def _caption(data: bytes | DamagedMember | None, settings: CaptionSettings) -> tuple[str, bool]:
    """Return the first caption and True, or the problem and False."""
    if data is None:
        return "no caption", False
    if isinstance(data, DamagedMember):
        return "damaged caption", False
    try:
        return read_captions(data, settings, "")[0], True
    except BadSample as error:
        return str(error).removeprefix(": ").removeprefix("its "), False


def _paint(sheet: Image.Image, left: int, top: int, cell: _Cell) -> None:
    draw = ImageDraw.Draw(sheet)
    right, bottom = left + CELL, top + CELL
    if cell.image is None:
        draw.line((left, top, right - 1, bottom - 1), FRAME)
        draw.line((left, bottom - 1, right - 1, top), FRAME)
        lines = "\n".join(textwrap.wrap(cell.why, WRAP, max_lines=6, placeholder="\u2026"))
        middle = (left + CELL / 2, top + CELL / 2)
        draw.multiline_text(middle, lines, ERROR, _font(10), "mm", align="center")
    else:
        width, height = cell.image.size
        sheet.paste(cell.image, (left + (CELL - width) // 2, top + (CELL - height) // 2))
    draw.rectangle((left - 1, top - 1, right, bottom), outline=FRAME)
    color = INK if cell.readable else ERROR
    draw.text((left, bottom + LINE / 2), _fit(cell.caption, CELL, 11), color, _font(11), "lm")


def _fit(text: str, width: int, size: int) -> str:
    """Shorten `text` to `width` pixels, ending in an ellipsis."""
    font = _font(size)
    text = text[:width]  # Longer text cannot fit; do not measure it.
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text.rstrip() + "\u2026"


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
