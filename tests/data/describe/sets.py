"""Data sets with known content."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from support import spoil
from tarfiles import write_tar

from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.text.captions import CaptionSettings

TXT = CaptionSettings()
# XOR with the generator polynomial leaves the CRC-32C of a message unchanged.
POLYNOMIAL = (0x82F63B78 << 1 | 1).to_bytes(5, "little")


def picture(
    color: Any, mode: str = "RGB", size: tuple[int, int] = (16, 16), kind: str = "PNG"
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)
    return file.getvalue()


def captioned(folder: Path, captions: Sequence[str | dict[str, Any]]) -> Index:
    """Write a set of captions only; a mapping becomes a json member."""
    members = [
        (f"s{i}.txt", c.encode()) if isinstance(c, str) else (f"s{i}.json", json.dumps(c).encode())
        for i, c in enumerate(captions)
    ]
    write_tar(folder / "captions.tar", members)
    return open_index(folder)


def pictured(folder: Path, images: dict[str, bytes]) -> Index:
    write_tar(folder / "images.tar", images)
    return open_index(folder)


def damaged_set(folder: Path) -> Index:
    """Write twelve samples, four of them damaged.

    Sample 3 has an invalid image, sample 5 an invalid caption, sample 8 both, and sample 10 an
    image whose checksum does not match.
    """
    members = [
        (f"s{i:02d}.{kind}", data)
        for i in range(12)
        for kind, data in (("png", picture((20 * i, 0, 0))), ("txt", b"number %d" % i))
    ]
    members[2 * 3] = ("s03.png", b"GIF89a without an image")
    members[2 * 5 + 1] = ("s05.txt", b"\xff\xfe")
    members[2 * 8] = ("s08.png", b"")
    members[2 * 8 + 1] = ("s08.txt", b"")
    write_tar(folder / "0.tar", members)
    index = open_index(folder)
    spoil(index, 10)
    return open_index(folder)
