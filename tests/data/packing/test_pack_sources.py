"""Sources of `data pack` that may mean something else: splits, delimiters, paths, captions."""

from __future__ import annotations

import gzip
import json
import logging
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from packs import PNG, album, expected, members, pack_error, write_arrow, write_table
from support import outcome
from tarfiles import write_tar

from gigabatch.data.packing.csv_tables import find_delimiter
from gigabatch.data.packing.pack import PackSettings, pack
from gigabatch.data.shards.indexing import open_index


def texts(folder: Path, *names: str) -> Path:
    """Write one table of text, or one shard, per name; each has two rows."""
    for name in names:
        rows = [{"text": f"{name} {i}"} for i in range(2)]
        if name.endswith(".tar"):
            write_tar(folder / name, {f"{name[:-4]}-{i}.txt": b"x" for i in range(2)})
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_table(folder / name, rows)
    return folder


SPLITS: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "Hugging Face": (
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet",
         "validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        {"train": 4, "validation": 2, "test": 2},
    ),
    "short names": (("train.jsonl", "val.jsonl"), {"train": 2, "validation": 2}),
    "words at the end": (
        ("wiki_train_a.csv", "wiki_train_b.csv", "wiki_dev.csv"), {"train": 4, "validation": 2},
    ),
    "years": (("captions_train2017.csv", "captions_val2017.csv"), {"train": 2, "validation": 2}),
    "shards": (("train-0.tar", "train-1.tar", "test-0.tar"), {"train": 4, "test": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_splits_are_refused_and_the_commands_pack_each(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names, counts = SPLITS[case]
    folder = texts(tmp_path / "in put", *names)
    monkeypatch.chdir(tmp_path)
    options = [] if case == "shards" else ["--file-column", "none"]
    code, _, error = outcome(monkeypatch, capsys, "data", "pack", folder, "OUT", *options)
    assert code == 2
    assert "files are of several splits" in error
    assert not (tmp_path / "OUT").exists()
    commands = re.findall(r"`gigabatch ([^`]+)`", error)
    assert len(commands) == len(counts)
    for command in commands:
        code, _, error = outcome(monkeypatch, capsys, *shlex.split(command), *options)
        assert code == 0, error
    packed = {split: len(members(tmp_path / "OUT" / split)) for split in counts}
    assert packed == counts
    merged = [folder, "merged", "--merge-splits", *options]
    assert outcome(monkeypatch, capsys, "data", "pack", *merged)[0] == 0
    assert len(members(tmp_path / "merged")) == sum(counts.values())


@pytest.mark.parametrize(
    "values", [("train", "val", "restval"), ("training", "test"), ("Dev", "test")]
)
def test_split_column_is_named_and_the_commands_make_a_view(
    values: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = [values[0]] * 3 + list(values[1:])
    rows = [{"text": f"t{i}", "split": name} for i, name in enumerate(names)]
    table, out = write_table(tmp_path / "t.csv", rows), tmp_path / "o ut"
    pack(table, out, PackSettings(file_column="none", prefix="p"))
    assert f"states several splits, which one set now merges: {values[0]} (3), " in caplog.text
    for command in re.findall(r"`gigabatch ([^`]+)`", caplog.text):
        assert outcome(monkeypatch, capsys, *shlex.split(command))[0] == 0
    assert len(open_index(f"{out}-{values[0]}")) == 3
    caplog.clear()
    pack(table, tmp_path / "b", PackSettings(file_column="none", merge_splits=True))
    assert "several splits" not in caplog.text


@pytest.mark.parametrize("values", [("train", "train"), ("a", "b"), ("1", "2")])
def test_column_of_one_split_or_other_values_is_not_named(
    values: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "t", "split": value} for value in values]
    pack(write_table(tmp_path / "t.csv", rows), tmp_path / "o", PackSettings(file_column="none"))
    assert "several splits" not in caplog.text


DISGUISED: dict[str, tuple[str, bytes, str]] = {
    "a spreadsheet": ("t.csv", b"PK\x03\x04" + bytes(range(256)), "it is a zip archive"),
    "a page": ("t.tsv", b"<!DOCTYPE html><html>quota exceeded", "it is an HTML page"),
    "gzip": ("t.jsonl", gzip.compress(b'{"text": "a"}'), "it is gzip-compressed data"),
    "a pointer": (
        "t.parquet",
        b"version https://git-lfs.github.com/spec/v1\n",
        "a Git LFS pointer",
    ),
    "a name of gzip": ("t.csv.gz", gzip.compress(b"text"), "not a table but gzip-compressed data"),
}


@pytest.mark.parametrize("case", DISGUISED)
def test_file_that_is_no_table_is_named(case: str, tmp_path: Path) -> None:
    name, content, expected = DISGUISED[case]
    (tmp_path / name).write_bytes(content)
    assert expected in pack_error(tmp_path / name, tmp_path / "out", file_column="none")


@pytest.mark.parametrize("encoding", ["utf-16", "iso-8859-1", "cp1252"])
def test_table_of_another_encoding_is_named(encoding: str, tmp_path: Path) -> None:
    text = "file,text\nx.png,größer\n"
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    message = pack_error(tmp_path / "t.csv", tmp_path / "out")
    assert "is not UTF-8 text" in message
    (tmp_path / "x.png").write_bytes(PNG)
    command = ["iconv", "-f", encoding, "-t", "UTF-8", tmp_path / "t.csv"]
    (tmp_path / "t.csv").write_bytes(subprocess.check_output(command))
    pack(tmp_path / "t.csv", tmp_path / "out")
    assert members(tmp_path / "out")["000000.txt"] == "größer".encode()


def test_tables_in_subfolders_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        texts(tmp_path / "in" / split, "metadata.csv")
    message = pack_error(tmp_path / "in", tmp_path / "out")
    assert f"{tmp_path / 'in' / 'test'} contains tables: pack each such folder" in message


def test_compressed_shards_are_named(tmp_path: Path) -> None:
    source = texts(tmp_path / "in", "a.tar")
    data = gzip.compress((source / "a.tar").read_bytes())
    (source / "a.tar").unlink()
    (source / "a.tar.gz").write_bytes(data)
    for name in (source, source / "a.tar.gz"):
        assert "unpack" in pack_error(name, tmp_path / "out")
    subprocess.run(["gunzip", source / "a.tar.gz"], check=True)
    assert pack(source, tmp_path / "out").samples == 2


def test_pattern_of_tables_is_one_table_in_order(tmp_path: Path) -> None:
    for part in ("a-1", "a-2", "b-1"):
        write_table(tmp_path / f"{part}.csv", [{"file": "x.png", "text": part}])
    (tmp_path / "x.png").write_bytes(PNG)
    pack(tmp_path / "a-*.csv", tmp_path / "out")
    assert [v for k, v in members(tmp_path / "out").items() if k[-3:] == "txt"] == [b"a-1", b"a-2"]
    pack(f"{tmp_path}/{{b,a}}-1.csv", tmp_path / "out2")
    assert len(members(tmp_path / "out2")) == 4
    assert "matches no file" in pack_error(tmp_path / "c-*.csv", tmp_path / "out3")
    write_table(tmp_path / "a-3.jsonl", [{"file": "x.png", "text": "t"}])
    assert "it contains .csv, .jsonl" in pack_error(tmp_path / "a-*", tmp_path / "out3")


LAYOUTS = {
    "tabs called .csv": ("t.csv", "\t", "filepath", "title"),
    "semicolons": ("t.csv", ";", "image", "caption"),
    "bars": ("t.csv", "|", "path", "text"),
    "commas called .tsv": ("t.tsv", ",", "file", "description"),
    "commas": ("t.csv", ",", "file_name", "alt_text"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_delimiter_is_found(case: str, tmp_path: Path) -> None:
    name, delimiter, file, caption = LAYOUTS[case]
    rows = album(tmp_path, 3)
    others = "".join(d for d in ",;|\t" if d != delimiter)
    lines = [[file, caption, "width"], *([r["file"], f"a {others} b", "7"] for r in rows)]
    (tmp_path / name).write_text("\n".join(delimiter.join(line) for line in lines) + "\n")
    pack(tmp_path / name, tmp_path / "out")
    packed = members(tmp_path / "out")
    assert len(packed) == 9
    assert packed["000001.txt"] == f"a {others} b".strip().encode()
    assert json.loads(packed["000001.json"]) == {"width": 7}


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("text\nhello; world\n", ","),
        ("a;b,c\n1;2,3\n", ","),
        ("a;b\n1,2;3\n", ";"),
        ("a;b\n1;2;3\n", ","),
        ("a;b|c\n1;2|3\n", ","),
        ('a\tb\n"x\ny"\t2\n', "\t"),
        ("", ","),
    ],
)
def test_delimiter_is_another_only_if_it_fits_every_line(
    text: str, delimiter: str, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(text)
    assert find_delimiter(tmp_path / "t.csv") == delimiter


def test_delimiter_option_is_named_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("file^text\nx.png^a\n")
    (tmp_path / "x.png").write_bytes(PNG)
    assert "set --delimiter to the character" in pack_error(table, tmp_path / "out")
    command = ["data", "pack", table, tmp_path / "out", "--delimiter", "^"]
    assert outcome(monkeypatch, capsys, *command)[0] == 0
    assert members(tmp_path / "out") == {"000000.png": PNG, "000000.txt": b"a"}
    (tmp_path / "t2.csv").write_text("file\ttext\nx.png\ta,b\n")
    command = ["data", "pack", tmp_path / "t2.csv", tmp_path / "out2", "--delimiter", r"\t"]
    assert outcome(monkeypatch, capsys, *command)[0] == 0


ABSOLUTE: dict[str, Callable[[Path, str], str]] = {
    "inside the folder": lambda folder, name: f"{folder}/{name}",
    "a file URL": lambda folder, name: f"file://{folder}/{name}".replace(" ", "%20"),
    "through a link": lambda folder, name: f"{folder.resolve()}/{name}",
    "doubled slashes": lambda folder, name: f"{folder}//{name}",
}


@pytest.mark.parametrize("case", ABSOLUTE)
def test_absolute_names_inside_the_folder_are_read(case: str, tmp_path: Path) -> None:
    (tmp_path / "real one").mkdir()
    (tmp_path / "link one").symlink_to(tmp_path / "real one")
    folder = tmp_path / "link one"
    rows = album(folder, 4)
    named = [row | {"file": ABSOLUTE[case](folder, row["file"])} for row in rows]
    pack(write_table(folder / "t.csv", named), tmp_path / "out")
    assert members(tmp_path / "out") == expected(folder, rows)


def test_absolute_names_elsewhere_are_read_from_the_folder_that_the_error_asks_for(
    tmp_path: Path,
) -> None:
    rows = album(tmp_path / "images", 4)
    named = [row | {"file": f"{tmp_path}/images/{row['file']}"} for row in rows]
    (tmp_path / "tables").mkdir()
    table = write_table(tmp_path / "tables" / "t.csv", named)
    message = pack_error(table, tmp_path / "out")
    assert f"is outside the folder {tmp_path / 'tables'}; " in message
    assert "set --folder to a folder that contains the files" in message
    for number, folder in enumerate((tmp_path / "images", tmp_path, Path("/"))):
        out = tmp_path / f"out{number}"
        pack(table, out, PackSettings(folder=folder, prefix="p"))
        assert members(out) == expected(tmp_path / "images", rows)


def test_table_without_captions_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gigabatch")
    pairs = [{"anchor": "a", "positive": "b", "negatives": ["c"]}, {"anchor": "d", "positive": "e"}]
    table = write_table(tmp_path / "pairs.jsonl", pairs)
    message = pack_error(table, tmp_path / "out")
    assert "columns: anchor, positive, negatives" in message
    assert "If rows have no file, set --file-column none." in message
    pack(table, tmp_path / "out", PackSettings(file_column="none"))
    assert "json from anchor, positive, negatives, no captions" in caplog.text
    assert "samples have no txt member" in caplog.text
    assert set(members(tmp_path / "out")) == {"000000.json", "000001.json"}
    settings = PackSettings(file_column="none", caption_column=("positive",))
    pack(table, tmp_path / "named", settings)
    assert members(tmp_path / "named")["000001.txt"] == b"e"
    assert "captions (txt) from 'positive'" in caplog.text


def test_first_names_win_over_second_names_of_captions(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    row = {"file": "x.png", "title": "no", "caption": "yes"}
    pack(write_table(tmp_path / "t.csv", [row]), tmp_path / "out")
    assert members(tmp_path / "out")["000000.txt"] == b"yes"
    row = {"file": "x.png", "title": "a", "description": "b"}
    message = pack_error(write_table(tmp_path / "u.csv", [row]), tmp_path / "out2")
    assert "several columns could be the caption column (title, description)" in message


@pytest.mark.parametrize("name", ["b.csv.gz", "b.jsonl.zst", "b.xlsx"])
def test_unread_tables_of_a_folder_are_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = texts(tmp_path / "in", "a.csv")
    (folder / name).write_bytes(b"\x1f\x8b")
    pack(folder, tmp_path / "out", PackSettings(file_column="none"))
    assert f"not read: {name}." in caplog.text
    (folder / "a.csv").unlink()
    message = pack_error(folder, tmp_path / "out2")
    assert f"not a table; {name} must be unpacked or converted first" in message


CONTENTS: dict[str, tuple[str, bytes]] = {
    "a GIF": ("is a GIF", b"GIF89a"),
    "a page": ("is an HTML page", b"<html>404"),
    "an AVIF": ("is an AVIF", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1"),
    "unknown": ("is not recognized", b"\x01\x02\x03"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_embedded_content_of_another_type_is_named(case: str, tmp_path: Path) -> None:
    what, data = CONTENTS[case]
    table = pa.table({"image": [data], "text": ["x"]})
    message = pack_error(write_arrow(tmp_path / "t.parquet", table), tmp_path / "out")
    assert f"file content {what}, not of a known type" in message


WRONG_FILES: dict[str, tuple[str, bytes, str]] = {
    "a page": ("x.jpg", b"<html>404", "it is an HTML page, not a PNG or a JPEG or a WebP"),
    "a GIF": ("x.png", b"GIF89a", "it is a GIF, not"),
    "a text": ("x.wav", b"Not Found", "it is a text that starts with 'Not Found', not a WAV"),
    "an image": ("x.flac", PNG, "it is a PNG, not"),
    "an .npz": ("x.npy", b"PK\x03\x04", "it is a zip archive, not a NumPy array"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
@pytest.mark.parametrize("is_embedded", [False, True])
def test_file_of_another_type_than_its_name_is_named_or_skipped(
    case: str, is_embedded: bool, tmp_path: Path
) -> None:
    name, data, what = WRONG_FILES[case]
    (tmp_path / "good.jpg").write_bytes(PNG)  # the image decoder reads it
    (tmp_path / name).write_bytes(data)
    files = ["good.jpg", name]
    rows = [{"file": file, "text": f"t{i}"} for i, file in enumerate(files)]
    if is_embedded:
        images = [{"bytes": (tmp_path / file).read_bytes(), "path": file} for file in files]
        table = pa.table({"image": pa.array(images), "text": [row["text"] for row in rows]})
        source = write_arrow(tmp_path / "t.parquet", table)
    else:
        source = write_table(tmp_path / "t.csv", rows)
    message = pack_error(source, tmp_path / "out")
    assert "row 1: " in message
    assert f"{name!r}: {what}" in message
    assert "--skip-missing" in message
    report = pack(source, tmp_path / "out", PackSettings(skip_missing=True))
    assert (report.samples, report.skipped) == (1, 1)
    assert what in (tmp_path / "out" / "skipped.jsonl").read_text().replace('\\"', '"')


def test_state_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", album(tmp_path, 5))
    pack(table, tmp_path / "out")
    path = tmp_path / "out" / "pack.json"
    state: dict[str, Any] = json.loads(path.read_text())
    for name in ("delimiter", "merge_splits"):
        del state["settings"][name]
    path.write_text(json.dumps(state))
    assert pack(table, tmp_path / "out").samples == 5
    shutil.rmtree(tmp_path / "out")
