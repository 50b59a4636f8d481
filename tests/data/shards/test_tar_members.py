from __future__ import annotations

import io
import os
import struct
import tarfile
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tarfiles import (
    FORMATS,
    contents,
    make_shard,
    overwrite,
    parsed_members,
    stdlib_members,
    write_tar,
)

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards import tar_members as tar_members
from gigabatch.data.shards.tar_members import BLOCK, read_members


def parse_error(path: Path) -> str:
    """Return the one-line error, which must be the same with and without checksums."""
    with pytest.raises(GigabatchError) as error:
        parsed_members(path, checksums=False)
    message = str(error.value)
    with pytest.raises(GigabatchError) as error:
        parsed_members(path)
    assert str(error.value) == message
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return make_shard(tmp_path / "set")


def test_webdataset_shard_matches_tarfile(shard: Path) -> None:
    members = parsed_members(shard)
    assert len(members) == 36
    assert members == stdlib_members(shard)


@pytest.mark.parametrize("piece", [1, 16 << 20])
def test_checksums_match_contents(shard: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_members, "PIECE", piece)  # larger members are read in pieces
    file = os.open(shard, os.O_RDONLY)
    members = read_members(file, str(shard), checksums=True)
    os.close(file)
    expected = [google_crc32c.value(data) for data in contents(shard).values()]
    assert members.checksums == expected


def test_damaged_size_raises_at_its_header(shard: Path) -> None:
    """The parser then reads data as headers; the error must name the damaged header."""
    _, offset, _ = stdlib_members(shard)[5]
    overwrite(shard, offset - BLOCK + 132, b"7")
    assert f"at byte {offset - BLOCK}:" in parse_error(shard)


@pytest.mark.parametrize("dialect", FORMATS)
@settings(max_examples=40)
@given(
    names=st.lists(
        st.text("abcé/", min_size=1, max_size=90).map(lambda s: s.strip("/") or "x"),
        unique=True, max_size=8,
    ),
    sizes=st.lists(st.integers(0, 1600), min_size=8, max_size=8),
)  # fmt: skip
def test_every_dialect_matches_tarfile(
    dialect: str, names: list[str], sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = dict(zip(names, (bytes([i]) * n for i, n in enumerate(sizes)), strict=False))
    path = write_tar(tmp_path_factory.mktemp("dialect") / "s.tar", data, dialect)
    assert parsed_members(path) == stdlib_members(path)


@pytest.mark.parametrize("dialect", ["gnu", "pax"])
def test_long_names_are_read(dialect: str, tmp_path: Path) -> None:
    names = ["a" * 300 + ".png", "short.png", "d" * 120 + "/" + "e" * 120 + "/ü.png"]
    path = write_tar(tmp_path / "s.tar", [(name, b"x" * 700) for name in names], dialect)
    assert [name for name, _, _ in parsed_members(path)] == names
    assert parsed_members(path) == stdlib_members(path)


def test_ustar_prefix_joins_name(tmp_path: Path) -> None:
    name = "d" * 90 + "/" + "e" * 60 + ".png"
    path = write_tar(tmp_path / "s.tar", {name: b"x"})
    assert [name for name, _, _ in parsed_members(path)] == [name]


@pytest.mark.parametrize("dialect", ["gnu", "pax"])
def test_long_folder_name_does_not_apply_to_next_file(dialect: str, tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=FORMATS[dialect]) as tar:
        folder = tarfile.TarInfo("d" * 150)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        file = tarfile.TarInfo("x.txt")
        file.size = 3
        tar.addfile(file, io.BytesIO(b"abc"))
    assert [name for name, _, _ in parsed_members(path)] == ["x.txt"]


def test_binary_extended_attributes_are_ignored(tmp_path: Path) -> None:
    """GNU tar --xattrs writes file capabilities as raw bytes."""
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        file = tarfile.TarInfo("x.txt")
        file.pax_headers = {"SCHILY.xattr.security.capability": "\udcff\udcfe"}
        tar.addfile(file)
    assert b"\xff\xfe" in path.read_bytes()
    assert [name for name, _, _ in parsed_members(path)] == ["x.txt"]


def test_base_256_sizes_are_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"x.txt": b"abc"})
    header = bytearray(path.read_bytes()[:BLOCK])
    header[124:136] = b"\x80" + bytes(3) + struct.pack(">Q", 3)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    overwrite(path, 0, bytes(header))
    assert [size for _, _, size in parsed_members(path)] == [3]
    assert [size for _, _, size in stdlib_members(path)] == [3]


def test_truncation_between_members_raises(shard: Path) -> None:
    _, offset, _ = stdlib_members(shard)[7]
    edge = offset - BLOCK
    shard.write_bytes(shard.read_bytes()[:edge])
    message = parse_error(shard)
    assert f"at byte {edge}:" in message
    assert "truncated" in message


def test_truncation_in_data_raises(shard: Path) -> None:
    _, offset, _ = stdlib_members(shard)[9]
    shard.write_bytes(shard.read_bytes()[: offset + 1])
    message = parse_error(shard)
    assert f"at byte {offset}:" in message
    assert "truncated" in message


def test_truncation_in_header_raises(shard: Path) -> None:
    _, offset, _ = stdlib_members(shard)[9]
    shard.write_bytes(shard.read_bytes()[: offset - 100])
    assert f"at byte {offset - BLOCK}:" in parse_error(shard)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncation_anywhere_raises(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("truncated") / "s.tar"
    write_tar(path, {f"{i}.txt": b"x" * 100 * i for i in range(6)})
    last = stdlib_members(path)[-1]
    end = last[1] + -(-last[2] // BLOCK) * BLOCK + BLOCK  # end of the first zero block
    path.write_bytes(path.read_bytes()[: int(share * end)])
    parse_error(path)


@pytest.mark.parametrize("byte", [0, 99, 124, 135, 148, 156, 257, 345, 511])
def test_single_damaged_header_byte_raises(shard: Path, byte: int) -> None:
    _, offset, _ = stdlib_members(shard)[5]
    position = offset - BLOCK + byte
    overwrite(shard, position, bytes([shard.read_bytes()[position] ^ 0x55]))
    message = parse_error(shard)
    assert f"at byte {offset - BLOCK}:" in message
    assert "damaged" in message


def test_zeros_over_header_raise(shard: Path) -> None:
    _, offset, _ = stdlib_members(shard)[6]
    overwrite(shard, offset - BLOCK, bytes(1024))
    message = parse_error(shard)
    assert f"at byte {offset - BLOCK}:" in message
    assert "followed by more data" in message


def test_long_tail_of_zeros_raises(shard: Path) -> None:
    """A file system may leave zeros in a file that was being written during a crash."""
    with open(shard, "ab") as file:  # more zeros than the padding of tar writers
        file.write(bytes(12_000 // BLOCK * BLOCK))
    _, offset, length = stdlib_members(shard)[-1]
    end = offset + -(-length // BLOCK) * BLOCK
    assert f"at byte {end}: zeros up to the end" in parse_error(shard)


@pytest.mark.parametrize("start", [0, 300])
def test_html_page_raises_not_a_tar_file(tmp_path: Path, start: int) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(b" " * start + b"<html><body>404 Not Found</body></html>" * 60)
    message = parse_error(path)
    assert "at byte 0:" in message
    assert "not a tar file" in message


@pytest.mark.parametrize("size", [0, 200, 512, 10240])
def test_only_files_of_zero_blocks_are_empty_tars(tmp_path: Path, size: int) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(bytes(size))
    if size < BLOCK:
        assert "at byte 0:" in parse_error(path)
    else:
        assert parsed_members(path) == []


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_raise(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    message = parse_error(path)
    assert f"at byte {BLOCK}:" in message
    assert "only files" in message


def test_name_that_is_not_utf8_raises(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
        tar.addfile(tarfile.TarInfo("é.txt"))
    assert f"at byte {BLOCK}:" in parse_error(path)


@pytest.mark.parametrize("size", ["-1024", "many"])
def test_invalid_size_in_extended_header_raises(tmp_path: Path, size: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        file = tarfile.TarInfo("x.txt")
        file.pax_headers = {"size": size}
        tar.addfile(file)
    parse_error(path)
