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
    make,
    members,
    pack_until,
    refusal,
    shard_files,
    write_arrow,
    write_table,
)
from tarfiles import write_tar

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.pack import PackSettings, pack
from gigabatch.data.shards.indexing import open_index


def test_what_is_missing_is_told_with_its_rows(tmp_path: Path) -> None:
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
    message = refusal(table, tmp_path / "out")
    assert message.startswith(f"{table}: 16 of 60 rows cannot be packed: row 3: ")
    assert f"{rows[3]['file']!r} is empty; row 4: 'im' is not of a known type" in message
    assert "row 5: names no file; row 6: has no caption; row 7: 'x.gif'" in message
    assert "; and 11 more" in message
    assert "skip_missing" in message
    assert not (tmp_path / "out").exists()


def test_missing_rows_are_left_out_on_request_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gigabatch.data.packing.pack.TOLD_EVERY", 7)
    rows = album(tmp_path, 100)
    gone = [0, 1, 28, 29, 30, 31, 65, 98, 99]
    for i in gone[:-1]:
        (tmp_path / rows[i]["file"]).unlink()
    rows[99]["caption"] = ""
    table = write_table(tmp_path / "t.csv", rows)
    settings = PackSettings(per_shard=30, prefix="p", skip_missing=True)
    report = pack(table, tmp_path / "whole", settings)
    assert (report.samples, report.skipped) == (91, 9)
    assert {int(name[:6]) for name in members(tmp_path / "whole")} == set(range(100)) - set(gone)
    lines = (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["row"] for line in found] == gone
    assert found[0] == {"row": 0, "file": rows[0]["file"], "why": f"{rows[0]['file']!r} is missing"}
    assert found[-1]["why"] == "has no caption"

    pack_until(table, tmp_path / "out", settings, 5)
    with open(tmp_path / "out" / "skipped.jsonl", "a") as file:
        file.write('{"row": 65, "fi')  # as if it was killed while it wrote this
    pack(table, tmp_path / "out", settings)
    assert shard_files(tmp_path / "out") == shard_files(tmp_path / "whole")


def test_rows_without_bytes_may_be_left_out_after_the_fact(tmp_path: Path) -> None:
    """Bytes are looked at only when they are written; what is finished by then stays."""
    rows = album(tmp_path, 100)
    whole = embedded(tmp_path, rows)
    images = whole["image"].to_pylist()
    images[70], images[80] = None, {"bytes": b"GIF89a", "path": None}
    table = pa.table({"image": images, "caption": whole["caption"], "width": whole["width"]})
    source = write_arrow(tmp_path / "t.parquet", table)
    message = refusal(source, tmp_path / "out", per_shard=30)
    assert message.startswith(f"{source}: row 70: holds no bytes. ")
    first = tmp_path / "out" / "out-000000.tar"
    written = first.stat().st_mtime_ns
    report = pack(source, tmp_path / "out", PackSettings(per_shard=30, skip_missing=True))
    assert (report.samples, report.skipped) == (98, 2)
    assert first.stat().st_mtime_ns == written
    found = members(tmp_path / "out")
    assert {int(name[:6]) for name in found} == set(range(100)) - {70, 80}


def test_a_table_of_which_every_row_is_skipped(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [{"file": "a.png", "caption": "x"}])
    assert "every row was skipped" in refusal(table, tmp_path / "out", skip_missing=True)


def test_a_file_that_goes_while_it_is_packed(tmp_path: Path) -> None:
    rows = album(tmp_path, 300)

    def remove(done: int, total: int) -> None:
        (tmp_path / rows[299]["file"]).unlink(missing_ok=True)

    with pytest.raises(GigabatchError, match=r"row 299: '.*' is missing\. Restore it"):
        pack(write_table(tmp_path / "t.csv", rows), tmp_path / "out", progress=remove)


WRONG_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "an absolute name": ({"file": "/etc/passwd.png"}, "leads out of the folder"),
    "a name with ..": ({"file": "im/../../x.png"}, "leads out of the folder"),
    "a URL": ({"file": "https://example.org/x.png"}, "is a URL"),
    "a number for a name": ({"file": 7}, "is no text"),
    "a caption that is no text": ({"caption": 7}, "its caption is 7"),
    "half a surrogate": ({"caption": "\ud800"}, "not Unicode"),
    "a key with a dot": ({"key": "a.b"}, "'a.b' is no key"),
    "a key with a slash": ({"key": "a/b"}, "'a/b' is no key"),
    "a key with a space": ({"key": "a b"}, "'a b' is no key"),
    "a key that readers pass over": ({"key": "__a__"}, "'__a__' is no key"),
    "an endless key": ({"key": "a" * 300}, "is no key"),
    "no key": ({"key": None}, "has no key"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_a_wrong_row_is_refused_and_never_skipped(case: str, tmp_path: Path) -> None:
    rows = [row | {"key": f"k{i}"} for i, row in enumerate(album(tmp_path, 5))]
    change, said = WRONG_ROWS[case]
    rows[3] |= change
    table = write_table(tmp_path / "t.jsonl", rows)
    message = refusal(table, tmp_path / "out", key_column="key", skip_missing=True)
    assert message.startswith(f"{table}: 1 of 5 rows cannot be packed: row 3: ")
    assert said in message
    assert not (tmp_path / "out").exists()


def test_a_key_that_comes_twice(tmp_path: Path) -> None:
    rows = [row | {"key": f"k{i % 40}"} for i, row in enumerate(album(tmp_path, 50))]
    table = write_table(tmp_path / "t.csv", rows)
    message = refusal(table, tmp_path / "out", key_column="key")
    assert f"{table}: the key 'k0' comes twice, in rows 0 and 40." in message


def test_a_key_that_comes_in_two_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.txt": b"1", "same.txt": b"2"})
    assert "key 'same' comes twice, in rows 1 and 3" in refusal(tmp_path, tmp_path / "out")


COLUMNS: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "no file": ({"name": "a", "text": "b"}, {}, "plainly the file_column. Set file_column; the"),
    "two files": ({"image": "a", "path": "b", "text": "c"}, {}, r"file_column \(image, path\)"),
    "no caption": ({"file": "a", "said": "b"}, {}, "plainly the caption_column"),
    "two captions": ({"file": "a", "Text": "b", "txt": "c"}, {}, r"caption_column \(Text, txt\)"),
    "no such file": ({"file": "a", "text": "b"}, {"file_column": "x"}, "has no column 'x'"),
    "no such caption": ({"file": "a", "text": "b"}, {"caption_column": ("x",)}, "no column 'x'"),
    "no such key": ({"file": "a", "text": "b"}, {"key_column": "x"}, "no column 'x'"),
    "no such field": ({"file": "a", "text": "b"}, {"json_columns": ("x",)}, "no column 'x'"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_cannot_be_told_are_listed(case: str, tmp_path: Path) -> None:
    row, settings, said = COLUMNS[case]
    table = write_table(tmp_path / "t.csv", [row])
    with pytest.raises(GigabatchError, match=said) as caught:
        pack(table, tmp_path / "out", PackSettings(**settings))
    assert f"the columns are {', '.join(row)}." in str(caught.value)


def test_bytes_that_are_no_file_must_be_left_out(tmp_path: Path) -> None:
    table = pa.table({"image": [PNG], "mask": [PNG], "text": ["x"]})
    source = write_arrow(tmp_path / "t.parquet", table)
    assert "file_column (image, mask)" in refusal(source, tmp_path / "out")
    assert "'mask' holds bytes" in refusal(source, tmp_path / "out", file_column="image")
    pack(source, tmp_path / "out", PackSettings(file_column="image", json_columns=()))
    assert members(tmp_path / "out") == {"000000.png": PNG, "000000.txt": b"x"}


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "a short row": ("t.csv", b"file,text\na,b\n\nc\n", "ends at line 4 has 1 fields"),
    "an open quote": ("t.csv", b'file,text\na,"b\nc,d\n', "unexpected end"),
    "no header": ("t.csv", b"", "first line must name the columns"),
    "a column twice": ("t.csv", b"file,text,file\n", "each once"),
    "no row": ("t.csv", b"file,text\n", "holds no row"),
    "no UTF-8": ("t.csv", b"file,text\na.png,\xff\n", "utf-8"),
    "no JSON": ("t.jsonl", b'{"file": "a", "text": "b"}\n{"a\n', "line 2: "),
    "no object": ("t.jsonl", b"[1]\n", "line 1 is no object"),
    "no Parquet": ("t.parquet", b"PAR1 not at all PAR1", "cannot be read"),
    "no Arrow": ("t.arrow", b"ARROW1 not at all", "cannot be read"),
    "another kind": ("t.xlsx", b"PK", "is no table"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_table_is_refused(case: str, tmp_path: Path) -> None:
    name, data, said = BROKEN[case]
    (tmp_path / name).write_bytes(data)
    message = refusal(tmp_path / name, tmp_path / "out")
    assert message.startswith(str(tmp_path / name))
    assert said in message
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "t.csv", tmp_path / "out")
    assert "is no table" in refusal(tmp_path, tmp_path / "out")


def test_a_remote_table_is_refused_by_its_address(tmp_path: Path) -> None:
    with pytest.raises(GigabatchError, match=r"^s3://bucket/t\.csv: tables are read from local"):
        pack("s3://bucket/t.csv", tmp_path / "out")
    with pytest.raises(GigabatchError, match="nothing was executed"):
        pack("pipe:touch x", tmp_path / "out")


def test_files_of_a_table_that_differ(tmp_path: Path) -> None:
    write_arrow(tmp_path / "a.parquet", pa.table({"image": [PNG], "text": ["x"], "n": [1]}))
    write_arrow(tmp_path / "b.parquet", pa.table({"image": [PNG], "text": ["x"], "n": ["1"]}))
    assert f"{tmp_path / 'b.parquet'}: differs from a.parquet in the columns n" in refusal(
        tmp_path, tmp_path / "out"
    )
    write_table(tmp_path / "c.csv", [{"file": "a", "text": "b"}])
    assert "(it has .csv, .parquet)" in refusal(tmp_path, tmp_path / "out")
    write_tar(tmp_path / "s.tar", {"a.txt": b"x"})
    assert "both shards and tables" in refusal(tmp_path, tmp_path / "out")


def test_settings_of_tables_are_refused_for_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.txt": b"x"})
    assert "key_column is for tables" in refusal(tmp_path, tmp_path / "out", key_column="x")


def test_members_of_other_types_are_not_packed(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.txt": b"x", "a.exe": b"y"})
    assert "type .exe are not packed" in refusal(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_not_packed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "in" / "s.tar", {f"{i}.txt": b"x" * 99 for i in range(9)})
    index = open_index(tmp_path / "in")
    offset, _ = index.member_span(5, "txt")
    times = shard.stat()
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(b"y")
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    message = refusal(tmp_path / "in", tmp_path / "out")
    assert message.startswith(f"{shard}: at byte {offset}: ")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    source = make("files", tmp_path, 3)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refusal(source, tmp_path / "file" / "out")


def test_names_that_no_shard_can_have(tmp_path: Path) -> None:
    source = make("files", tmp_path, 3)
    assert "Set prefix" in refusal(source, tmp_path / "a[1]")
    with pytest.raises(ValueError, match="prefix"):
        PackSettings(prefix="../x")
