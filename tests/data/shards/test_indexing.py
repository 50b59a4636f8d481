from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tarfiles import make_shard, overwrite, stdlib_members, write_tar

from gigabatch.data.decode.members import decode_column
from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.index import ROWS, Index
from gigabatch.data.shards.index_files import write_index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.scan import IndexSettings
from gigabatch.data.shards.sources import indexed_codes


def jsons(values: list[object], first: int = 0) -> dict[str, bytes]:
    """Return one sample per value, with the value as its json member; None gives no json member."""
    members = {}
    for i, value in enumerate(values, first):
        members[f"s{i:03d}.txt"] = b"x"
        if value is not None:
            members[f"s{i:03d}.json"] = json.dumps(value).encode()
    return members


def keys(index: Index) -> list[str]:
    return [index.key(i) for i in range(len(index))]


def test_added_shards_are_indexed_last(tmp_path: Path) -> None:
    """A sample must keep its row, which is the key of its per-sample state."""
    write_tar(tmp_path / "m.tar", jsons([1, 2]))
    write_tar(tmp_path / "p.tar", jsons([3], first=2))
    assert keys(open_index(tmp_path)) == ["s000", "s001", "s002"]
    write_tar(tmp_path / "a.tar", jsons([4], first=10))
    write_tar(tmp_path / "z.tar", jsons([5], first=20))
    index = open_index(tmp_path)
    assert keys(index) == ["s000", "s001", "s002", "s010", "s020"]
    assert [Path(shard.name).name for shard in index.shards] == ["m.tar", "p.tar", "a.tar", "z.tar"]


def test_read_only_set_uses_index_inside_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", jsons([{"n": 1}, {"n": 2}]))
    open_index(tmp_path, columns=["n"])
    tmp_path.chmod(0o555)
    try:
        index = open_index(tmp_path)
        assert index.columns == ("n",)
        assert index.folder == tmp_path / ".gigabatch"
    finally:
        tmp_path.chmod(0o755)


def test_indexed_shards_are_not_scanned_again(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", jsons([1, 2]))
    open_index(tmp_path)
    calls: list[tuple[int, int]] = []
    write_tar(tmp_path / "c.tar", jsons([3]))
    overwrite(tmp_path / "a.tar", 0, b"\xff" * 512)  # keeps the size; the time is reset below
    state = json.loads((tmp_path / ".gigabatch" / "manifest.json").read_text())["shards"][0]
    os.utime(tmp_path / "a.tar", ns=(0, int(state["version"])))
    assert len(open_index(tmp_path, lambda *done: calls.append(done))) == 5
    assert calls == [(2, 3), (3, 3)]


def test_removed_shard_resets_row_order(tmp_path: Path) -> None:
    for i, name in enumerate("bca"):
        write_tar(tmp_path / f"{name}.tar", jsons([i], first=i))
        open_index(tmp_path)
    (tmp_path / "b.tar").unlink()
    assert keys(open_index(tmp_path)) == ["s002", "s001"]


def test_error_lists_all_damaged_shards(tmp_path: Path) -> None:
    offsets = {}
    for name in "abcd":
        shard = write_tar(tmp_path / f"{name}.tar", jsons([1, 2, 3]))
        if name in "bd":
            offsets[name] = stdlib_members(shard)[2][1] - 512
            overwrite(shard, offsets[name] + 20, b"\xaa")
    with pytest.raises(GigabatchError) as error:
        open_index(tmp_path)
    lines = str(error.value).split("\n")
    assert [line.split(": ")[:2] for line in lines] == [
        [str(tmp_path / f"{name}.tar"), f"at byte {offsets[name]}"] for name in "bd"
    ]


def test_shards_scanned_before_error_are_not_scanned_again(tmp_path: Path) -> None:
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", jsons([1, 2, 3]))
    intact = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(intact[:1000])
    with pytest.raises(GigabatchError, match=r"b\.tar: at byte"):
        open_index(tmp_path)
    (tmp_path / "b.tar").write_bytes(intact)
    calls: list[tuple[int, int]] = []
    open_index(tmp_path, lambda *done: calls.append(done))
    assert calls == [(2, 3), (3, 3)]
    assert not (tmp_path / ".gigabatch" / "parts").exists()


@pytest.mark.slow
def test_killed_build_resumes(tmp_path: Path) -> None:
    for name in range(8):
        write_tar(tmp_path / f"{name}.tar", {f"{i}.txt": bytes(9_000) for i in range(1000)})
    command = (
        "from gigabatch.data.shards.indexing import open_index; import sys; open_index(sys.argv[1])"
    )
    parts = tmp_path / ".gigabatch" / "parts"
    process = subprocess.Popen([sys.executable, "-c", command, str(tmp_path)],
                               start_new_session=True)  # fmt: skip
    while not list(parts.glob("*.arrow")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(list(parts.glob("*.arrow"))) < 8
    calls: list[tuple[int, int]] = []
    assert len(open_index(tmp_path, lambda *done: calls.append(done))) == 8000
    assert calls[0][0] > 0


@pytest.mark.slow
def test_index_is_equal_for_any_number_of_processes(tmp_path: Path) -> None:
    for name in range(5):
        random = np.random.default_rng(name)
        members = {f"{i}.txt": random.bytes(30_000) for i in range(500)}
        write_tar(tmp_path / f"{name}.tar", members)
    parallel = open_index(tmp_path, processes=3)
    (tmp_path / ".gigabatch" / "manifest.json").unlink()
    assert open_index(tmp_path, processes=1) == parallel


def test_pattern_has_its_own_index(tmp_path: Path) -> None:
    for i, name in enumerate(["a-00", "a-01", "a-02", "b-00"]):
        write_tar(tmp_path / f"{name}.tar", jsons([i], first=i))
    assert keys(open_index(f"{tmp_path}/a-*.tar")) == ["s000", "s001", "s002"]
    assert keys(open_index(f"{tmp_path}/a-{{01..02}}.tar")) == ["s001", "s002"]
    assert keys(open_index(f"{tmp_path}/b-00.tar")) == ["s003"]
    assert not (tmp_path / ".gigabatch").exists()


def test_json_fields_become_typed_columns(tmp_path: Path) -> None:
    values = [
        {"n": 3, "f": 0.5, "s": "en", "b": True, "mixed": "one", "deep": {"y": 1, "x": [2]}},
        {"n": -7, "f": 2, "s": "de", "b": False, "mixed": 1, "deep": None},
    ]
    write_tar(tmp_path / "a.tar", jsons([*values, None]))
    names = ("n", "f", "s", "b", "mixed", "deep", "missing")
    index = open_index(tmp_path, settings=IndexSettings(columns=names))
    rows = np.arange(3)
    assert {name: index.values(name, rows) for name in names} == {
        "n": [3, -7, None], "f": [0.5, 2.0, None], "s": ["en", "de", None],
        "b": [True, False, None], "mixed": ['"one"', "1", None],
        "deep": ['{"x": [2], "y": 1}', None, None], "missing": [None] * 3,
    }  # fmt: skip


def test_json_field_with_different_types_per_shard_becomes_text(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", jsons([{"n": 3, "m": 1}]))
    write_tar(tmp_path / "b.tar", jsons([{"n": "x", "m": 2.5}, {}], first=1))
    index = open_index(tmp_path, settings=IndexSettings(columns=("n", "m")))
    assert index.values("n", np.arange(3)) == ["3", '"x"', None]
    assert index.values("m", np.arange(3)) == [1.0, 2.5, None]


BIG = [2**53 + 1, -(2**60), 2**62, 2**64, 10**40]


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ([[1, "1", 1.0, True, "x", {"b": 2.0, "a": "\u00e9"}]],
         ["1", '"1"', "1", "true", '"x"', '{"a": "\u00e9", "b": 2}']),
        ([[1], ["1"], [True], [1.0], [[1]]], ["1", '"1"', "true", "1", "[1]"]),
        ([[1], [2.5], ["x"]], ["1", "2.5", '"x"']),
        ([BIG], list(map(str, BIG))),
        ([BIG[:2]], BIG[:2]),
        ([BIG[:1], [0.5]], [str(BIG[0]), "0.5"]),
        ([[7], BIG[:1], [0.5]], ["7", str(BIG[0]), "0.5"]),
        ([[BIG[0], 0.5]], [str(BIG[0]), "0.5"]),
        ([[2**53], [0.5]], [2.0**53, 0.5]),
        ([["half \ud83d", "caf\u00e9"]], ["half \ufffd", "caf\u00e9"]),
        ([[["\ud83d"]]], ['["\ufffd"]']),
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_one_build", [True, False])
def test_mixed_json_values_keep_equality(
    shards: list[list[object]], expected: list[object], in_one_build: bool, tmp_path: Path
) -> None:
    first = 0
    for number, values in enumerate(shards):
        members = jsons([{"v": value} for value in values], first)
        write_tar(tmp_path / f"{number}.tar", members)
        first += len(values)
        if not in_one_build:
            open_index(tmp_path, columns=["v"])
    index = open_index(tmp_path, columns=["v"])
    assert index.values("v", np.arange(first)) == expected


def test_deeply_nested_json_raises_with_sample_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.txt": b"1", "x.json": b"[" * 200_000})
    with pytest.raises(GigabatchError, match="json member of sample 'x' cannot be read"):
        open_index(tmp_path, columns=["n"])


@pytest.mark.parametrize("name", ["", "key", "source", "png.offset", "x.size", "txt.crc"])
def test_reserved_column_name_raises(name: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", jsons([{name: 7}]))
    with pytest.raises(GigabatchError, match=re.escape(f"--columns: {name!r} cannot be")):
        open_index(tmp_path, columns=[name])
    assert keys(open_index(tmp_path)) == ["s000"]


def test_columns_added_later_stay(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", jsons([{"n": 1, "s": "x"}]))
    first = open_index(tmp_path)
    assert open_index(tmp_path, columns=["n"]).columns == ("n",)
    both = open_index(tmp_path, columns=["s", "n"])
    assert both.columns == ("n", "s")
    assert open_index(tmp_path).columns == ("n", "s")
    assert both.digest == first.digest  # json columns are not part of the digest


def test_invalid_json_raises_with_shard_and_offset(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"x.txt": b"1", "x.json": b"{not json"})
    with pytest.raises(GigabatchError, match=r"json member of sample 'x' cannot be read") as error:
        open_index(tmp_path, columns=["n"])
    assert f"{shard}: at byte {stdlib_members(shard)[1][1]}:" in str(error.value)


def test_index_without_checksums_matches_full_index(tmp_path: Path) -> None:
    make_shard(tmp_path)
    quick = open_index(tmp_path, settings=IndexSettings(checksums=False))
    assert "png.crc" not in quick.table.column_names
    full = open_index(tmp_path, settings=IndexSettings())
    assert "png.crc" in full.table.column_names
    assert full.digest != quick.digest
    assert full.table.drop_columns(["png.crc", "txt.crc", "json.crc"]).equals(quick.table)


def test_rows_are_correct_across_record_batches(tmp_path: Path) -> None:
    import pyarrow as pa

    sizes = [ROWS - 3, 7, 2 * ROWS]  # shards straddle record batches
    total = sum(sizes)

    def table(first: int, count: int) -> pa.Table:
        rows = np.arange(first, first + count)
        return pa.table(
            {
                "key": pa.array([f"{row:x}" for row in rows], pa.large_string()),
                "txt.offset": rows + 1,
                "txt.size": rows % 7,
            }
        )

    firsts = np.cumsum([0, *sizes[:-1]])
    tables = [table(int(first), size) for first, size in zip(firsts, sizes, strict=True)]
    shards = [
        {"name": f"{i}.tar", "bytes": 1, "version": "", "samples": size, "digest": str(i)}
        for i, size in enumerate(sizes)
    ]
    settings = json.loads(IndexSettings(checksums=False).model_dump_json())
    manifest = {"format": 2, "settings": settings, "shards": shards, "digest": "d" * 64}
    write_index(tables, tables[0].schema, manifest, tmp_path)
    from gigabatch.data.shards.index import index_from_manifest, read_manifest

    index = index_from_manifest("x", tmp_path, read_manifest(tmp_path), ["a", "b", "c"])
    rows = np.array([total - 1, 0, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 5, 3])
    assert index.take("txt.offset", rows).tolist() == (rows + 1).tolist()
    assert index.values("key", rows) == [f"{row:x}" for row in rows]
    assert index.table["key"].num_chunks == 4
    assert len(index.samples_without("txt")) == 0
    assert dict(index.member_counts) == {"txt": total}


def test_pattern_may_be_longer_than_file_name_limit(tmp_path: Path) -> None:
    names = [f"shard-{number:06d}" for number in range(60)]
    for name in names:
        write_tar(tmp_path / f"{name}.tar", {f"{name}.txt": b"x"})
    assert len(open_index(f"{tmp_path}/{{{','.join(names)}}}.tar")) == 60


def test_codes_of_mixed_column_match_json_values(tmp_path: Path) -> None:
    values: list[object] = [1, "1", "cat", {"a": 2}]
    write_tar(tmp_path / "a.tar", jsons([{"c": value} for value in values]))
    index = open_index(tmp_path, columns=["c"])
    codes = [decode_column(json.dumps({"c": value}).encode(), "c", "a.tar") for value in values]
    assert indexed_codes(index, "c").tolist() == codes
    assert indexed_codes(index, "c", np.arange(4)).tolist() == codes
