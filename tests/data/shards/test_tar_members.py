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
from tarfiles import FORMATS, contents, listed, overwrite, shard_of, walked, write_tar

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards import tar_members as tarwalk
from gigabatch.data.shards.tar_members import BLOCK, read_members


def refusal(path: Path) -> str:
    """The same one, whether data are read or headers alone."""
    with pytest.raises(GigabatchError) as caught:
        walked(path, checksums=False)
    message = str(caught.value)
    with pytest.raises(GigabatchError) as caught:
        walked(path)
    assert str(caught.value) == message
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return shard_of(tmp_path / "set")


def test_webdataset_shards_hold_what_tarfile_says(shard: Path) -> None:
    found = walked(shard)
    assert len(found) == 36
    assert found == listed(shard)


@pytest.mark.parametrize("large", [1, 16 << 20])
def test_checksums_are_those_of_the_contents(
    shard: Path, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarwalk, "PIECE", large)  # members above it are read in pieces
    file = os.open(shard, os.O_RDONLY)
    members = read_members(file, str(shard), checksums=True)
    os.close(file)
    expected = [google_crc32c.value(data) for data in contents(shard).values()]
    assert members.checksums == expected


def test_a_damaged_size_is_named_where_it_is(shard: Path) -> None:
    """It leads the walk into the middle of data; the fault is in the header before."""
    _, offset, _ = listed(shard)[5]
    overwrite(shard, offset - BLOCK + 132, b"7")
    assert f"at byte {offset - BLOCK}:" in refusal(shard)


@pytest.mark.parametrize("dialect", FORMATS)
@settings(max_examples=40)
@given(
    names=st.lists(
        st.text("abcé/", min_size=1, max_size=90).map(lambda s: s.strip("/") or "x"),
        unique=True, max_size=8,
    ),
    sizes=st.lists(st.integers(0, 1600), min_size=8, max_size=8),
)  # fmt: skip
def test_every_dialect_reads_as_tarfile_reads_it(
    dialect: str, names: list[str], sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = dict(zip(names, (bytes([i]) * n for i, n in enumerate(sizes)), strict=False))
    path = write_tar(tmp_path_factory.mktemp("dialect") / "s.tar", data, dialect)
    assert walked(path) == listed(path)


@pytest.mark.parametrize("dialect", ["gnu", "pax"])
def test_names_too_long_for_a_header(dialect: str, tmp_path: Path) -> None:
    names = ["a" * 300 + ".png", "short.png", "d" * 120 + "/" + "e" * 120 + "/ü.png"]
    path = write_tar(tmp_path / "s.tar", [(name, b"x" * 700) for name in names], dialect)
    assert [name for name, _, _ in walked(path)] == names
    assert walked(path) == listed(path)


def test_ustar_prefixes_join_names(tmp_path: Path) -> None:
    name = "d" * 90 + "/" + "e" * 60 + ".png"
    path = write_tar(tmp_path / "s.tar", {name: b"x"})
    assert [name for name, _, _ in walked(path)] == [name]


@pytest.mark.parametrize("dialect", ["gnu", "pax"])
def test_a_folder_keeps_its_long_name_to_itself(dialect: str, tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=FORMATS[dialect]) as tar:
        folder = tarfile.TarInfo("d" * 150)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        file = tarfile.TarInfo("x.txt")
        file.size = 3
        tar.addfile(file, io.BytesIO(b"abc"))
    assert [name for name, _, _ in walked(path)] == ["x.txt"]


def test_binary_extended_attributes_are_passed_over(tmp_path: Path) -> None:
    """GNU tar --xattrs writes file capabilities as raw bytes."""
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        file = tarfile.TarInfo("x.txt")
        file.pax_headers = {"SCHILY.xattr.security.capability": "\udcff\udcfe"}
        tar.addfile(file)
    assert b"\xff\xfe" in path.read_bytes()
    assert [name for name, _, _ in walked(path)] == ["x.txt"]


def test_base_256_sizes_are_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"x.txt": b"abc"})
    header = bytearray(path.read_bytes()[:BLOCK])
    header[124:136] = b"\x80" + bytes(3) + struct.pack(">Q", 3)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    overwrite(path, 0, bytes(header))
    assert [size for _, _, size in walked(path)] == [3] == [size for _, _, size in listed(path)]


def test_cut_at_a_member_edge(shard: Path) -> None:
    _, offset, _ = listed(shard)[7]
    edge = offset - BLOCK
    shard.write_bytes(shard.read_bytes()[:edge])
    message = refusal(shard)
    assert f"at byte {edge}:" in message
    assert "cut short" in message


def test_cut_inside_the_data(shard: Path) -> None:
    _, offset, _ = listed(shard)[9]
    shard.write_bytes(shard.read_bytes()[: offset + 1])
    message = refusal(shard)
    assert f"at byte {offset}:" in message
    assert "truncated" in message


def test_cut_inside_a_header(shard: Path) -> None:
    _, offset, _ = listed(shard)[9]
    shard.write_bytes(shard.read_bytes()[: offset - 100])
    assert f"at byte {offset - BLOCK}:" in refusal(shard)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_no_cut_goes_unnoticed(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "s.tar"
    write_tar(path, {f"{i}.txt": b"x" * 100 * i for i in range(6)})
    last = listed(path)[-1]
    end = last[1] + -(-last[2] // BLOCK) * BLOCK + BLOCK  # of the first block of the end mark
    path.write_bytes(path.read_bytes()[: int(share * end)])
    refusal(path)


@pytest.mark.parametrize("byte", [0, 99, 124, 135, 148, 156, 257, 345, 511])
def test_one_bad_header_byte(shard: Path, byte: int) -> None:
    _, offset, _ = listed(shard)[5]
    position = offset - BLOCK + byte
    overwrite(shard, position, bytes([shard.read_bytes()[position] ^ 0x55]))
    message = refusal(shard)
    assert f"at byte {offset - BLOCK}:" in message
    assert "damaged" in message


def test_a_kibibyte_of_zeros_over_a_header(shard: Path) -> None:
    _, offset, _ = listed(shard)[6]
    overwrite(shard, offset - BLOCK, bytes(1024))
    message = refusal(shard)
    assert f"at byte {offset - BLOCK}:" in message
    assert "followed by more data" in message


def test_a_tail_of_zeros_is_no_end(shard: Path) -> None:
    """What file systems leave of a file whose writing a crash cut off."""
    with open(shard, "ab") as file:  # so that more is lost than a tar may end with
        file.write(bytes(12_000 // BLOCK * BLOCK))
    _, offset, length = listed(shard)[-1]
    end = offset + -(-length // BLOCK) * BLOCK
    assert f"at byte {end}: zeros up to the end" in refusal(shard)


@pytest.mark.parametrize("start", [0, 300])
def test_an_error_page_in_place_of_a_tar(tmp_path: Path, start: int) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(b" " * start + b"<html><body>404 Not Found</body></html>" * 60)
    message = refusal(path)
    assert "at byte 0:" in message
    assert "not a tar file" in message


@pytest.mark.parametrize("size", [0, 200, 512, 10240])
def test_files_without_members(tmp_path: Path, size: int) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(bytes(size))
    if size < BLOCK:
        assert "at byte 0:" in refusal(path)
    else:
        assert walked(path) == []


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    message = refusal(path)
    assert f"at byte {BLOCK}:" in message
    assert "only files" in message


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
        tar.addfile(tarfile.TarInfo("é.txt"))
    assert f"at byte {BLOCK}:" in refusal(path)


@pytest.mark.parametrize("size", ["-1024", "many"])
def test_impossible_sizes_in_extended_headers_are_refused(tmp_path: Path, size: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        file = tarfile.TarInfo("x.txt")
        file.pax_headers = {"size": size}
        tar.addfile(file)
    refusal(path)
