"""Tar files of every dialect, made by others than us, and ways to damage them."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from support import write_samples

from gigabatch.data.shards.tar_members import read_members

FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}


def write_tar(
    path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], dialect: str = "ustar"
) -> Path:
    items = members.items() if isinstance(members, Mapping) else members
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[dialect]) as tar:
        for name, data in items:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def listed(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset of the data, size) of each file, according to the standard library."""
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]


def walked(path: Path, checksums: bool = True) -> list[tuple[str, int, int]]:
    """(name, offset of the data, size) of each file, according to us."""
    file = os.open(path, os.O_RDONLY)
    try:
        members = read_members(file, str(path), checksums)
    finally:
        os.close(file)
    assert len(members.checksums) == (len(members.names) if checksums else 0)
    return list(zip(members.names, members.offsets, members.sizes, strict=True))


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]


def overwrite(path: Path, position: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)


def shard_of(folder: Path, count: int = 12) -> Path:
    """One webdataset shard of small images, captions and json."""
    write_samples(folder, count, count, seed=3)
    return next(folder.glob("*.tar"))
