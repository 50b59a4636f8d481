from __future__ import annotations

import os
from pathlib import Path

import pytest
from tarfiles import FORMATS, contents, write_tar

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.reader import Reader


def test_members_match_tarfile_contents(shards: Path) -> None:
    index = open_index(shards / "train")
    expected = {k: v for shard in index.shards for k, v in contents(Path(shard.name)).items()}
    with Reader(index) as reader:
        members = {
            f"{index.key(i)}.{member}": reader.read(i, member)
            for i in reversed(range(len(index)))
            for member in index.members
        }
    assert members == expected


@pytest.mark.parametrize("dialect", FORMATS)
def test_members_of_every_tar_dialect_are_read(dialect: str, tmp_path: Path) -> None:
    long_name = "d" * 90 + "/" + "n" * 60
    members = {f"{long_name}.txt": b"abc", f"{long_name}.json": b"", "b.txt": bytes(range(256)) * 9}
    write_tar(tmp_path / "s.tar", members, dialect)
    index = open_index(tmp_path)
    with Reader(index) as reader:
        assert reader.read(0, "txt") == b"abc"
        assert reader.read(0, "json") == b""
        assert reader.read(1, "txt") == bytes(range(256)) * 9


def test_shard_truncated_after_indexing_raises(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "train-000.tar").write_bytes((shards / "train" / "train-000.tar").read_bytes())
    index = open_index(tmp_path)
    offset, size = index.member_span(30, "png")
    os.truncate(tmp_path / "train-000.tar", offset + 5)
    with Reader(index) as reader, pytest.raises(GigabatchError) as error:
        reader.read(30, "png")
    message = str(error.value)
    assert f"{tmp_path / 'train-000.tar'}: at byte {offset}:" in message
    assert "'s00030'" in message
    assert f"5 of {size} bytes" in message


def test_missing_shard_raises(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.txt": b"x"})
    index = open_index(tmp_path)
    shard.unlink()
    with Reader(index) as reader, pytest.raises(GigabatchError, match="cannot be read"):
        reader.read(0, "txt")


def test_reader_limits_open_shards_and_closes_all(tmp_path: Path) -> None:
    count = Reader.OPEN_SHARDS + 10
    for i in range(count):
        write_tar(tmp_path / f"s{i:03d}.tar", {f"k{i}.txt": str(i).encode()})
    index = open_index(tmp_path)

    def open_shards() -> int:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(os.path.realpath(link).startswith(str(tmp_path / "s")) for link in links)

    with Reader(index) as reader:
        for _ in range(2):
            assert [int(reader.read(i, "txt")) for i in range(count)] == list(range(count))
        assert open_shards() == Reader.OPEN_SHARDS
    assert open_shards() == 0
