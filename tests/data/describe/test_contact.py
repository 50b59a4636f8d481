"""The contact sheet of a set."""

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


def cell(sheet: Image.Image, place: int, columns: int) -> Image.Image:
    """The image in the cell number `place` of a sheet."""
    row, column = divmod(place, columns)
    left, top = GAP + column * (CELL + GAP), TITLE + row * (CELL + LINE + GAP)
    return sheet.crop((left, top, left + CELL, top + CELL))


def centre(image: Image.Image) -> tuple[int, ...]:
    pixel = image.getpixel((CELL // 2, CELL // 2))
    assert isinstance(pixel, tuple)
    return pixel


def sheet_of(index: Index, out: Path, **options: Any) -> Image.Image:
    contact_sheet(index, TXT, out, **options)
    with Image.open(out) as file:
        assert file.format == "PNG"
        return file.convert("RGB")


def test_a_contact_sheet_shows_the_images_in_order(tmp_path: Path) -> None:
    index = damaged_set(tmp_path)
    sheet = sheet_of(index, tmp_path / "new" / "sheet.png", columns=5, rows=3)
    assert sheet.size == (GAP + 5 * (CELL + GAP), TITLE + 3 * (CELL + LINE + GAP))
    for place in (0, 1, 2, 4, 5, 6, 7, 9, 11):
        assert cell(sheet, place, 5).getcolors() == [(CELL * CELL, (20 * place, 0, 0))]
    white = cell(sheet, 12, 5).getcolors()
    assert white == [(CELL * CELL, (255, 255, 255))]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_a_damaged_image_is_a_crossed_box_with_the_reason(tmp_path: Path) -> None:
    sheet = sheet_of(damaged_set(tmp_path), tmp_path / "sheet.png", columns=5, rows=3)
    for place in (3, 8, 10):
        box = cell(sheet, place, 5)
        colours = {colour for _, colour in box.getcolors(1 << 14) or ()}
        assert (192, 32, 32) in colours  # the reason
        for at in (0, 9, CELL - 1):
            assert box.getpixel((at, at)) == box.getpixel((CELL - 1 - at, at)) == (208, 208, 208)


def test_a_caption_stands_below_its_image(tmp_path: Path) -> None:
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
    assert CELL * 0.9 < ink[0].max() < CELL  # ellipsised to the cell
    assert ink[1].max() < 6


@pytest.mark.parametrize(
    ("colour", "mode", "kind", "shown"),
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
def test_images_of_every_mode_are_shown_as_they_look(
    tmp_path: Path, colour: Any, mode: str, kind: str, shown: tuple[int, ...]
) -> None:
    name = f"a.{kind.lower()}".replace("jpeg", "jpg")
    index = pictured(tmp_path, {name: picture(colour, mode, kind=kind)})
    pixel = centre(cell(sheet_of(index, tmp_path / "sheet.png"), 0, 1))
    assert np.abs(np.subtract(pixel, shown)).max() <= 2


def test_a_palette_with_a_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=1)
    index = pictured(tmp_path, {"a.png": file.getvalue()})
    sheet = sheet_of(index, tmp_path / "sheet.png")
    assert centre(cell(sheet, 0, 1)) == (255, 255, 255)


def test_the_shape_of_an_image_is_kept(tmp_path: Path) -> None:
    index = pictured(
        tmp_path, {"a.png": picture("red", size=(2000, 1)), "b.png": picture("red", size=(50, 100))}
    )
    sheet = sheet_of(index, tmp_path / "sheet.png")
    thin, tall = (np.asarray(cell(sheet, place, 2))[..., 1] == 0 for place in range(2))
    assert (thin.any(axis=1).sum(), thin.any(axis=0).sum()) == (1, CELL)
    assert (tall.any(axis=1).sum(), tall.any(axis=0).sum()) == (CELL, CELL // 2)
    assert np.flatnonzero(thin.any(axis=1)) == [(CELL - 1) // 2]
    assert np.flatnonzero(tall.any(axis=0))[0] == CELL // 4


def test_a_seed_chooses_samples_of_the_whole_set(tmp_path: Path) -> None:
    shades = {f"{i:03d}.png": picture((i, i, i)) for i in range(200)}
    index = pictured(tmp_path, shades)
    seen = []
    for seed in (0, 0, 1):
        sheet = sheet_of(index, tmp_path / "sheet.png", columns=4, rows=5, seed=seed)
        seen.append([centre(cell(sheet, place, 4))[0] for place in range(20)])
    assert seen[0] == seen[1] != seen[2]
    assert [shade // 10 for shade in seen[0]] == list(range(20))  # one of each ten, in order
    assert len({shade % 10 for shade in seen[0]}) > 3


def test_a_sheet_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    index = pictured(tmp_path, {"a.png": picture("red")})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        GigabatchError, match=r"file/sheet\.png: the contact sheet cannot be written"
    ):
        contact_sheet(index, TXT, tmp_path / "file" / "sheet.png")
    for folder in (Path("/"), Path(), tmp_path):
        with pytest.raises(GigabatchError, match=r"is a folder\. Name a file"):
            contact_sheet(index, TXT, folder)
    with pytest.raises(GigabatchError, match=r"no sample has a \.png"):
        contact_sheet(captioned(tmp_path / "text", ["a"]), TXT, tmp_path / "sheet.png")


def test_captions_of_the_shards_are_read_as_they_lie_there(tmp_path: Path) -> None:
    write_samples(tmp_path, 30, 30, seed=1)
    texts = [
        d.decode() for n, d in contents(next(tmp_path.glob("*.tar"))).items() if n.endswith("txt")
    ]
    found = collect(open_index(tmp_path), TXT).captions
    assert found is not None
    assert found.characters is not None
    assert found.characters.total == sum(map(len, texts))
