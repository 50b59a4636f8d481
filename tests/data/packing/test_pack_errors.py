"""Errors of `data pack`: missing files, invalid rows, malformed tables, rejected shards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from packs import (
    PNG,
    album,
    embedded,
    make_source,
    members,
    pack_error,
    pack_until,
    shard_files,
    write_arrow,
    write_table,
)
from tarfiles import write_tar

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.pack import PackSettings, pack
from gigabatch.data.shards.indexing import open_index


def test_missing_files_and_captions_are_listed_by_row(tmp_path: Path) -> None:
    rows = album(tmp_path, 60)
    for i in range(10, 20):
        (tmp_path / rows[i]["file"]).unlink()
    (tmp_path / rows[3]["file"]).write_bytes(b"")
    rows[4]["file"] = "im"
    rows[5]["file"] = ""
    rows[6]["caption"] = "  \n"
    rows[7]["file"] = "x.gif"
    rows[8]["file"] = "no\0name.png"
    table = write_table(tmp_path / "t{0}[1].jsonl", rows)
    message = pack_error(table, tmp_path / "out")
    assert message.startswith(f"{table}: 16 of 60 rows cannot be packed: row 3: ")
    assert f"{rows[3]['file']!r} is empty; row 4: 'im' is not of a known type" in message
    assert "row 5: no file name; row 6: no caption; row 7: 'x.gif'" in message
    assert "; and 11 more" in message
    assert "--skip-missing" in message
    assert not (tmp_path / "out").exists()


def test_skip_missing_skips_rows_and_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gigabatch.data.packing.pack.PROGRESS_EVERY", 7)
    rows = album(tmp_path, 100)
    missing = [0, 1, 28, 29, 30, 31, 65, 98, 99]
    for i in missing[:-1]:
        (tmp_path / rows[i]["file"]).unlink()
    rows[99]["caption"] = ""
    table = write_table(tmp_path / "t.csv", rows)
    settings = PackSettings(per_shard=30, prefix="p", skip_missing=True)
    report = pack(table, tmp_path / "full", settings)
    assert (report.samples, report.skipped) == (91, 9)
    assert {int(name[:6]) for name in members(tmp_path / "full")} == set(range(100)) - set(missing)
    lines = (tmp_path / "full" / "skipped.jsonl").read_text().splitlines()
    skipped = [json.loads(line) for line in lines]
    assert [row["row"] for row in skipped] == missing
    name = rows[0]["file"]
    assert skipped[0] == {"row": 0, "file": name, "why": f"{name!r} is missing"}
    assert skipped[-1]["why"] == "no caption"

    pack_until(table, tmp_path / "out", settings, 5)
    with open(tmp_path / "out" / "skipped.jsonl", "a") as file:
        file.write('{"row": 65, "fi')  # a line truncated by a kill
    pack(table, tmp_path / "out", settings)
    assert shard_files(tmp_path / "out") == shard_files(tmp_path / "full")


def test_skip_missing_can_be_set_when_resuming(tmp_path: Path) -> None:
    """Embedded files are checked when their shard is written, so earlier shards are kept."""
    rows = album(tmp_path, 100)
    complete = embedded(tmp_path, rows)
    images = complete["image"].to_pylist()
    images[70], images[80] = None, {"bytes": b"GIF89a", "path": None}
    table = pa.table({"image": images, "caption": complete["caption"], "width": complete["width"]})
    source = write_arrow(tmp_path / "t.parquet", table)
    message = pack_error(source, tmp_path / "out", per_shard=30)
    assert message.startswith(f"{source}: row 70: no file content. ")
    first = tmp_path / "out" / "out-000000.tar"
    written = first.stat().st_mtime_ns
    report = pack(source, tmp_path / "out", PackSettings(per_shard=30, skip_missing=True))
    assert (report.samples, report.skipped) == (98, 2)
    assert first.stat().st_mtime_ns == written
    packed = members(tmp_path / "out")
    assert {int(name[:6]) for name in packed} == set(range(100)) - {70, 80}


def test_skipping_every_row_fails(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [{"file": "a.png", "caption": "x"}])
    assert "every row was skipped" in pack_error(table, tmp_path / "out", skip_missing=True)


def test_file_deleted_during_packing_is_reported(tmp_path: Path) -> None:
    rows = album(tmp_path, 300)

    def remove(done: int, total: int) -> None:
        (tmp_path / rows[299]["file"]).unlink(missing_ok=True)

    with pytest.raises(GigabatchError, match=r"row 299: '.*' is missing\. Restore it"):
        pack(write_table(tmp_path / "t.csv", rows), tmp_path / "out", progress=remove)


INVALID_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "an absolute name": ({"file": "/etc/passwd.png"}, "is outside the folder"),
    "a name with ..": ({"file": "im/../../x.png"}, "is outside the folder"),
    "a URL": ({"file": "https://example.org/x.png"}, "is a URL"),
    "a number for a name": ({"file": 7}, "file name 7 is not text"),
    "a caption that is not text": ({"caption": 7}, "caption 7 is not text"),
    "an unpaired surrogate": ({"caption": "\ud800"}, "not valid Unicode"),
    "a key with a dot": ({"key": "a.b"}, "'a.b' is not a valid key"),
    "a key with a slash": ({"key": "a/b"}, "'a/b' is not a valid key"),
    "a key with a space": ({"key": "a b"}, "'a b' is not a valid key"),
    "a key that readers ignore": ({"key": "__a__"}, "'__a__' is not a valid key"),
    "a key that is too long": ({"key": "a" * 300}, "is not a valid key"),
    "no key": ({"key": None}, "row 3: no key"),
}


@pytest.mark.parametrize("case", INVALID_ROWS)
def test_invalid_row_fails_despite_skip_missing(case: str, tmp_path: Path) -> None:
    rows = [row | {"key": f"k{i}"} for i, row in enumerate(album(tmp_path, 5))]
    change, expected = INVALID_ROWS[case]
    rows[3] |= change
    table = write_table(tmp_path / "t.jsonl", rows)
    message = pack_error(table, tmp_path / "out", key_column="key", skip_missing=True)
    assert message.startswith(f"{table}: 1 of 5 rows cannot be packed: row 3: ")
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_repeated_key_in_table_is_reported(tmp_path: Path) -> None:
    rows = [row | {"key": f"k{i % 40}"} for i, row in enumerate(album(tmp_path, 50))]
    table = write_table(tmp_path / "t.csv", rows)
    message = pack_error(table, tmp_path / "out", key_column="key")
    assert f"{table}: rows 0 and 40 have the same key 'k0'." in message


def test_repeated_key_across_shards_is_reported(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.txt": b"1", "same.txt": b"2"})
    assert "rows 1 and 3 have the same key 'same'" in pack_error(tmp_path, tmp_path / "out")


COLUMNS: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "no file": (
        {"name": "a", "text": "b"},
        {},
        "no column is clearly the file column. Set --file-column to one of the",
    ),
    "two files": ({"image": "a", "path": "b", "text": "c"}, {}, r"file column \(image, path\)"),
    "no caption": ({"file": "a", "said": "b"}, {}, "clearly the caption column"),
    "two captions": ({"file": "a", "Text": "b", "txt": "c"}, {}, r"caption column \(Text, txt\)"),
    "no such file": ({"file": "a", "text": "b"}, {"file_column": "x"}, "there is no column 'x'"),
    "no such caption": ({"file": "a", "text": "b"}, {"caption_column": ("x",)}, "no column 'x'"),
    "no such key": ({"file": "a", "text": "b"}, {"key_column": "x"}, "no column 'x'"),
    "no such field": ({"file": "a", "text": "b"}, {"json_columns": ("x",)}, "no column 'x'"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_ambiguous_or_unknown_columns_are_listed(case: str, tmp_path: Path) -> None:
    row, settings, pattern = COLUMNS[case]
    table = write_table(tmp_path / "t.csv", [row])
    with pytest.raises(GigabatchError, match=pattern) as error:
        pack(table, tmp_path / "out", PackSettings(**settings))
    assert f"to one of the columns: {', '.join(row)}" in str(error.value)


def test_second_column_of_bytes_must_be_excluded(tmp_path: Path) -> None:
    table = pa.table({"image": [PNG], "mask": [PNG], "text": ["x"]})
    source = write_arrow(tmp_path / "t.parquet", table)
    assert "file column (image, mask)" in pack_error(source, tmp_path / "out")
    assert "'mask' contains bytes" in pack_error(source, tmp_path / "out", file_column="image")
    pack(source, tmp_path / "out", PackSettings(file_column="image", json_columns=()))
    assert members(tmp_path / "out") == {"000000.png": PNG, "000000.txt": b"x"}


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "a short row": ("t.csv", b"file,text\na,b\n\nc\n", "ends at line 4 has 1 fields"),
    "an open quote": ("t.csv", b'file,text\na,"b\nc,d\n', "unexpected end"),
    "no header": ("t.csv", b"", "first line must name the columns"),
    "a column twice": ("t.csv", b"file,text,file\n", "each with a different name"),
    "no row": ("t.csv", b"file,text\n", "there are no rows"),
    "not UTF-8": ("t.csv", b"file,text\na.png,\xff\n", "is not UTF-8"),
    "not JSON": ("t.jsonl", b'{"file": "a", "text": "b"}\n{"a\n', "line 2: "),
    "not an object": ("t.jsonl", b"[1]\n", "line 1 is not a JSON object"),
    "not Parquet": ("t.parquet", b"PAR1 not at all PAR1", "cannot be read"),
    "not Arrow": ("t.arrow", b"ARROW1 not at all", "cannot be read"),
    "another format": ("t.xlsx", b"PK", "not a table"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_table_is_reported(case: str, tmp_path: Path) -> None:
    name, data, expected = BROKEN[case]
    (tmp_path / name).write_bytes(data)
    message = pack_error(tmp_path / name, tmp_path / "out")
    assert message.startswith(str(tmp_path / name))
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_missing_source_is_reported(tmp_path: Path) -> None:
    assert "No such file" in pack_error(tmp_path / "t.csv", tmp_path / "out")
    assert "not a table" in pack_error(tmp_path, tmp_path / "out")


def test_remote_table_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        GigabatchError, match=r"^s3://bucket/t\.csv: tables must be on a local disk"
    ):
        pack("s3://bucket/t.csv", tmp_path / "out")
    with pytest.raises(GigabatchError, match="nothing was executed"):
        pack("pipe:touch x", tmp_path / "out")


def test_table_files_with_different_columns_are_rejected(tmp_path: Path) -> None:
    write_arrow(tmp_path / "a.parquet", pa.table({"image": [PNG], "text": ["x"], "n": [1]}))
    write_arrow(tmp_path / "b.parquet", pa.table({"image": [PNG], "text": ["x"], "n": ["1"]}))
    message = pack_error(tmp_path, tmp_path / "out")
    expected = f"{tmp_path / 'b.parquet'}: columns n or their types differ from a.parquet"
    assert expected in message
    write_table(tmp_path / "c.csv", [{"file": "a", "text": "b"}])
    assert "not a table; it contains .csv, .parquet" in pack_error(tmp_path, tmp_path / "out")
    write_tar(tmp_path / "s.tar", {"a.txt": b"x"})
    assert "both shards and tables" in pack_error(tmp_path, tmp_path / "out")


def test_table_settings_are_rejected_for_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.txt": b"x"})
    assert "--key-column applies to tables" in pack_error(
        tmp_path, tmp_path / "out", key_column="x"
    )


def test_unsupported_member_types_are_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.txt": b"x", "a.exe": b"y"})
    assert "type .exe cannot be packed" in pack_error(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_shard_is_rejected(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "in" / "s.tar", {f"{i}.txt": b"x" * 99 for i in range(9)})
    index = open_index(tmp_path / "in")
    offset, _ = index.member_span(5, "txt")
    times = shard.stat()
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(b"y")
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    message = pack_error(tmp_path / "in", tmp_path / "out")
    assert message.startswith(f"{shard}: at byte {offset}: ")


def test_unwritable_output_folder_is_reported(tmp_path: Path) -> None:
    source = make_source("files", tmp_path, 3)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in pack_error(source, tmp_path / "file" / "out")


def test_invalid_shard_names_are_rejected(tmp_path: Path) -> None:
    source = make_source("files", tmp_path, 3)
    assert "Set --prefix" in pack_error(source, tmp_path / "a[1]")
    with pytest.raises(ValueError, match="prefix"):
        PackSettings(prefix="../x")
