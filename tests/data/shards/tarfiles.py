"""Tar files in every dialect, written by the standard library, and helpers to damage them."""

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


def stdlib_members(path: Path) -> list[tuple[str, int, int]]:
    """Return (name, data offset, size) of every file, as the standard library reads them."""
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]


def parsed_members(path: Path, checksums: bool = True) -> list[tuple[str, int, int]]:
    """Return (name, data offset, size) of every file, as `read_members` reads them."""
    file = os.open(path, os.O_RDONLY)
    try:
        members = read_members(file, str(path), checksums)
    finally:
        os.close(file)
    assert len(members.checksums) == (len(members.names) if checksums else 0)
    return list(zip(members.names, members.offsets, members.sizes, strict=True))


def contents(path: Path) -> dict[str, bytes]:
    """Return file name -> data."""
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]


def overwrite(path: Path, position: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)


def make_shard(folder: Path, count: int = 12) -> Path:
    """Write one webdataset shard of small images, captions and json; return its path."""
    write_samples(folder, count, count, seed=3)
    return folder / f"{folder.name}-000.tar"
