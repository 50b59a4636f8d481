"""Contact sheets: layout, image modes, error boxes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sets import TXT, captioned, damaged_set, picture, pictured
from support import write_samples
from tarfiles import contents

from gigabatch.data.describe.contact import CELL, GAP, LINE, TITLE, contact_sheet
from gigabatch.data.describe.stats import collect
from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import open_index


def cell(sheet: Image.Image, position: int, columns: int) -> Image.Image:
    """Return the image in a cell of a sheet; cells are numbered by rows."""
    row, column = divmod(position, columns)
    left, top = GAP + column * (CELL + GAP), TITLE + row * (CELL + LINE + GAP)
    return sheet.crop((left, top, left + CELL, top + CELL))


def center_pixel(image: Image.Image) -> tuple[int, ...]:
    pixel = image.getpixel((CELL // 2, CELL // 2))
    assert isinstance(pixel, tuple)
    return pixel


def sheet_of(index: Index, out: Path, **options: Any) -> Image.Image:
    contact_sheet(index, TXT, out, **options)
    with Image.open(out) as file:
        assert file.format == "PNG"
        return file.convert("RGB")


def test_contact_sheet_shows_images_in_order(tmp_path: Path) -> None:
    index = damaged_set(tmp_path)
    sheet = sheet_of(index, tmp_path / "new" / "sheet.png", columns=5, rows=3)
    assert sheet.size == (GAP + 5 * (CELL + GAP), TITLE + 3 * (CELL + LINE + GAP))
    for position in (0, 1, 2, 4, 5, 6, 7, 9, 11):
        assert cell(sheet, position, 5).getcolors() == [(CELL * CELL, (20 * position, 0, 0))]
    white = cell(sheet, 12, 5).getcolors()
    assert white == [(CELL * CELL, (255, 255, 255))]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_damaged_image_becomes_crossed_box_with_reason(tmp_path: Path) -> None:
    sheet = sheet_of(damaged_set(tmp_path), tmp_path / "sheet.png", columns=5, rows=3)
    for position in (3, 8, 10):
        box = cell(sheet, position, 5)
        colors = {color for _, color in box.getcolors(1 << 14) or ()}
        assert (192, 32, 32) in colors  # the color of the reason's text
        for x in (0, 9, CELL - 1):
            assert box.getpixel((x, x)) == box.getpixel((CELL - 1 - x, x)) == (208, 208, 208)


def test_caption_is_below_its_image_and_fits_the_cell(tmp_path: Path) -> None:
    images = {
        "a.png": picture("red"),
        "a.txt": b"mmmm " * 40,
        "b.png": picture("red"),
        "b.txt": b"i",
    }
    sheet = sheet_of(pictured(tmp_path, images), tmp_path / "sheet.png")
    top = TITLE + CELL + 1
    ink = []
    for column in range(2):
        left = GAP + column * (CELL + GAP)
        strip = sheet.crop((left, top, left + CELL + GAP // 2, top + LINE)).convert("L")
        ink.append(np.flatnonzero((np.asarray(strip) < 128).any(axis=0)))
    assert CELL * 0.9 < ink[0].max() < CELL  # shortened to the cell's width
    assert ink[1].max() < 6


@pytest.mark.parametrize(
    ("color", "mode", "kind", "expected"),
    [
        ((0, 0, 255, 0), "RGBA", "PNG", (255, 255, 255)),
        ((0, 255), "LA", "PNG", (0, 0, 0)),
        (51 * 257, "I;16", "PNG", (51, 51, 51)),
        (1, "1", "PNG", (255, 255, 255)),
        (90, "L", "JPEG", (90, 90, 90)),
        ((0, 255, 255, 0), "CMYK", "JPEG", (254, 0, 0)),
        ((0, 0, 255, 128), "RGBA", "WEBP", (127, 127, 255)),
    ],
)
def test_images_of_every_mode_keep_their_color(
    tmp_path: Path, color: Any, mode: str, kind: str, expected: tuple[int, ...]
) -> None:
    name = f"a.{kind.lower()}".replace("jpeg", "jpg")
    index = pictured(tmp_path, {name: picture(color, mode, kind=kind)})
    pixel = center_pixel(cell(sheet_of(index, tmp_path / "sheet.png"), 0, 1))
    assert np.abs(np.subtract(pixel, expected)).max() <= 2


def test_transparent_palette_color_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=1)
    index = pictured(tmp_path, {"a.png": file.getvalue()})
    sheet = sheet_of(index, tmp_path / "sheet.png")
    assert center_pixel(cell(sheet, 0, 1)) == (255, 255, 255)


def test_aspect_ratio_of_images_is_kept(tmp_path: Path) -> None:
    index = pictured(
        tmp_path, {"a.png": picture("red", size=(2000, 1)), "b.png": picture("red", size=(50, 100))}
    )
    sheet = sheet_of(index, tmp_path / "sheet.png")
    wide, tall = (np.asarray(cell(sheet, i, 2))[..., 1] == 0 for i in range(2))
    assert (wide.any(axis=1).sum(), wide.any(axis=0).sum()) == (1, CELL)
    assert (tall.any(axis=1).sum(), tall.any(axis=0).sum()) == (CELL, CELL // 2)
    assert np.flatnonzero(wide.any(axis=1)) == [(CELL - 1) // 2]
    assert np.flatnonzero(tall.any(axis=0))[0] == CELL // 4


def test_seed_chooses_samples_from_all_parts_of_the_set(tmp_path: Path) -> None:
    shades = {f"{i:03d}.png": picture((i, i, i)) for i in range(200)}
    index = pictured(tmp_path, shades)
    samples = []
    for seed in (0, 0, 1):
        sheet = sheet_of(index, tmp_path / "sheet.png", columns=4, rows=5, seed=seed)
        samples.append([center_pixel(cell(sheet, i, 4))[0] for i in range(20)])
    assert samples[0] == samples[1] != samples[2]
    assert [shade // 10 for shade in samples[0]] == list(range(20))  # one of every ten
    assert len({shade % 10 for shade in samples[0]}) > 3


def test_unwritable_sheet_or_set_without_images_is_reported(tmp_path: Path) -> None:
    index = pictured(tmp_path, {"a.png": picture("red")})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        GigabatchError, match=r"file/sheet\.png: the contact sheet cannot be written"
    ):
        contact_sheet(index, TXT, tmp_path / "file" / "sheet.png")
    for folder in (Path("/"), Path(), tmp_path):
        with pytest.raises(GigabatchError, match=r"this is a folder\. Specify a file name"):
            contact_sheet(index, TXT, folder)
    with pytest.raises(GigabatchError, match=r"no sample has a \.png"):
        contact_sheet(captioned(tmp_path / "text", ["a"]), TXT, tmp_path / "sheet.png")


def test_captions_match_the_shard_content(tmp_path: Path) -> None:
    write_samples(tmp_path, 30, 30, seed=1)
    texts = [
        d.decode() for n, d in contents(next(tmp_path.glob("*.tar"))).items() if n.endswith("txt")
    ]
    captions = collect(open_index(tmp_path), TXT).captions
    assert captions is not None
    assert captions.characters is not None
    assert captions.characters.total == sum(map(len, texts))
