"""Sources, formats and column choices that `data pack` accepts, and the samples it writes."""

from __future__ import annotations

import json
import os
import tarfile
from datetime import date
from decimal import Decimal
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
from packs import (
    JPG,
    PNG,
    album,
    embedded,
    expected,
    make_source,
    members,
    pack_error,
    shard_files,
    write_arrow,
    write_table,
)
from tarfiles import contents, write_tar

from gigabatch.data.packing import row_store
from gigabatch.data.packing.pack import PackSettings, pack
from gigabatch.data.shards.filtered_view import create_view
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.reader import Reader


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "arrow", "feather"])
def test_table_rows_with_files_become_samples(kind: str, tmp_path: Path) -> None:
    rows = album(tmp_path, 100)
    table = write_table(tmp_path / f"t.{kind}", rows)
    calls: list[tuple[int, int]] = []
    report = pack(table, tmp_path / "out", PackSettings(per_shard=40), lambda *n: calls.append(n))
    assert members(tmp_path / "out") == expected(tmp_path, rows)
    names = ["out-000000.tar", "out-000001.tar", "out-000002.tar"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*names, "pack.json"]
    sizes = [(tmp_path / "out" / name).stat().st_size for name in names]
    assert (report.shards, report.samples, report.bytes, report.skipped) == (3, 100, sum(sizes), 0)
    assert calls[-1] == (100, 100)


def test_rows_pack_without_a_file_column(tmp_path: Path) -> None:
    rows = [{"query": f"q {i}", "passages": [f"yes {i}", "no"]} for i in range(5)]
    table = write_table(tmp_path / "t.jsonl", rows)
    pack(table, tmp_path / "out", PackSettings(file_column="none"))
    packed = members(tmp_path / "out")
    assert packed.keys() == {f"00000{i}.json" for i in range(5)}
    assert [json.loads(packed[name]) for name in sorted(packed)] == rows
    captioned = write_table(tmp_path / "c.jsonl", [row | {"text": "t"} for row in rows])
    pack(captioned, tmp_path / "with", PackSettings(file_column="none"))
    assert members(tmp_path / "with")["000003.txt"] == b"t"


def test_json_field_first_seen_in_a_late_line_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    rows = [{"file": "a.png", "caption": "x"}] * 1100
    table = write_table(tmp_path / "t.jsonl", [*rows, {**rows[0], "licence": "CC0"}])
    pack(table, tmp_path / "out")
    packed = members(tmp_path / "out")
    assert json.loads(packed["001100.json"]) == {"licence": "CC0"}
    assert json.loads(packed["000000.json"]) == {"licence": None}


def test_long_csv_caption_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    caption = "word " * 40_000
    pack(write_table(tmp_path / "t.csv", [{"file": "a.png", "caption": caption}]), tmp_path / "out")
    assert members(tmp_path / "out")["000000.txt"].decode() == caption


def test_webdataset_reads_packed_shards(tmp_path: Path) -> None:
    rows = album(tmp_path, 30)
    pack(write_table(tmp_path / "t.csv", rows), tmp_path / "out", PackSettings(per_shard=20))
    urls = [str(p) for p in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{i:06d}" for i in range(30)]
    for sample, row in zip(samples, rows, strict=True):
        assert sample["txt"].decode() == row["caption"]
        assert json.loads(sample["json"]) == {"width": row["width"]}
        image = sample["jpg" if row["file"].endswith("JPG") else "png"]
        assert image == (tmp_path / row["file"]).read_bytes()


def test_index_reads_packed_shards(tmp_path: Path) -> None:
    rows = album(tmp_path, 30)
    pack(write_table(tmp_path / "t.csv", rows), tmp_path / "out", PackSettings(per_shard=20))
    index = open_index(tmp_path / "out")
    assert index.shard_sizes.tolist() == [20, 10]
    assert index.members == ("jpg", "json", "png", "txt")
    with Reader(index) as reader:
        captions = [reader.read(i, "txt").decode() for i in range(30)]
    assert captions == [row["caption"] for row in rows]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
@pytest.mark.parametrize("seed", [None, 7])
def test_embedded_files_become_samples(kind: str, seed: int | None, tmp_path: Path) -> None:
    rows = album(tmp_path, 100)
    table = write_arrow(tmp_path / f"t.{kind}", embedded(tmp_path, rows))
    pack(table, tmp_path / "out", PackSettings(per_shard=40, shuffle_seed=seed))
    assert members(tmp_path / "out") == expected(tmp_path, rows)


def test_embedded_file_without_name_gets_type_from_first_bytes(tmp_path: Path) -> None:
    starts = {
        "png": PNG, "jpg": JPG, "webp": b"RIFF\0\0\0\0WEBPVP8 ", "wav": b"RIFF\0\0\0\0WAVEfmt ",
        "flac": b"fLaC\0", "ogg": b"OggS\0", "mp3": b"ID3\x04", "npy": b"\x93NUMPY\1\0",
    }  # fmt: skip
    table = pa.table({"data": list(starts.values()), "text": list(starts)})
    pack(write_arrow(tmp_path / "t.parquet", table), tmp_path / "out")
    assert members(tmp_path / "out") == {
        f"{i:06d}.{kind}": data
        for i, (name, start) in enumerate(starts.items())
        for kind, data in ((name, start), ("txt", name.encode()))
    }


def test_known_extension_overrides_first_bytes(tmp_path: Path) -> None:
    images = [{"bytes": PNG, "path": name} for name in ("../a.WEBP", "b", "c.php", None)]
    table = pa.table({"image": images, "text": ["x"] * 4})
    pack(write_arrow(tmp_path / "t.parquet", table), tmp_path / "out")
    names = [name for name in members(tmp_path / "out") if not name.endswith("txt")]
    assert names == ["000000.webp", "000001.png", "000002.png", "000003.png"]


def test_folder_of_files_is_one_table(tmp_path: Path) -> None:
    rows = album(tmp_path, 100)
    table = embedded(tmp_path, rows)
    for part, first in enumerate(range(0, 100, 30)):
        write_arrow(tmp_path / "set" / f"data-{part:05d}.arrow", table.slice(first, 30), rows=7)
    write_arrow(tmp_path / "set" / "cache-ab12.arrow", table)  # a cache file of `datasets`
    pack(tmp_path / "set", tmp_path / "out")
    assert members(tmp_path / "out") == expected(tmp_path, rows)


def test_csv_column_is_numeric_only_if_json_writes_every_value_unchanged(tmp_path: Path) -> None:
    rows = album(tmp_path, 3)
    cells = {
        "integer": ["0", "-12", "12345678901234567890"], "real": ["0.5", "2", ""],
        "code": ["007", "12", "13"], "version": ["1.9", "1.10", "2.0"], "mixed": ["1", "n/a", "2"],
        "none": ["", "", ""], "word": ["NaN", "Infinity", "true"],
        "flag": ["true", "false", "true"],
    }  # fmt: skip
    for name, column in cells.items():
        for row, cell in zip(rows, column, strict=True):
            row[name] = cell
    pack(write_table(tmp_path / "t.csv", rows), tmp_path / "out")
    trees = [json.loads(d) for n, d in members(tmp_path / "out").items() if n.endswith(".json")]
    columns = {name: [tree[name] for tree in trees] for name in trees[0]}
    assert columns == {
        "width": [0, 1, 2], "integer": [0, -12, 12345678901234567890], "real": [0.5, 2, None],
        "code": cells["code"], "version": cells["version"], "mixed": cells["mixed"],
        "none": [None] * 3, "word": cells["word"],
        "flag": cells["flag"],
    }  # fmt: skip


def test_text_column_of_typed_table_stays_text(tmp_path: Path) -> None:
    rows = [row | {"code": "12"} for row in album(tmp_path, 2)]
    pack(write_table(tmp_path / "t.parquet", rows), tmp_path / "out")
    assert json.loads(members(tmp_path / "out")["000000.json"])["code"] == "12"


def test_values_without_json_type_are_converted(tmp_path: Path) -> None:
    rows = album(tmp_path, 1)
    rows[0] |= {"when": date(2020, 2, 3), "cost": Decimal("1.50"), "score": float("nan")}
    rows[0] |= {"box": [{"x": 1.5}, None]}
    pack(write_table(tmp_path / "t.parquet", rows), tmp_path / "out")
    assert json.loads(members(tmp_path / "out")["000000.json"]) == {
        "width": 0, "when": "2020-02-03", "cost": "1.50", "score": None, "box": [{"x": 1.5}, None],
    }  # fmt: skip
    infinite = write_table(tmp_path / "i.parquet", [rows[0] | {"score": float("inf")}])
    assert "row 0: a value cannot be written as JSON" in pack_error(infinite, tmp_path / "o2")


def test_additional_captions_go_into_json_member(tmp_path: Path) -> None:
    rows = album(tmp_path, 2)
    rows[0]["caption"] = ["", "first", "second"]
    rows[1]["caption"] = ["only"]
    pack(write_table(tmp_path / "t.parquet", rows), tmp_path / "a")
    packed = members(tmp_path / "a")
    assert (packed["000000.txt"], packed["000001.txt"]) == (b"first", b"only")
    assert json.loads(packed["000000.json"]) == {"caption": ["", "first", "second"], "width": 0}

    rows = [row | {"caption": "tree", "french": "arbre", "german": "Baum"} for row in rows]
    settings = PackSettings(caption_column=("caption", "french"), json_columns=("width",))
    pack(write_table(tmp_path / "t.csv", rows), tmp_path / "b", settings)
    packed = members(tmp_path / "b")
    assert packed["000000.txt"] == b"tree"
    assert json.loads(packed["000000.json"]) == {"french": "arbre", "width": 0}


def test_column_settings_override_guesses(tmp_path: Path) -> None:
    rows = album(tmp_path, 3)
    rows = [{"a": r["file"][3:], "b": r["caption"], "c": f"k-{i}"} for i, r in enumerate(rows)]
    table = write_table(tmp_path / "t.csv", rows)
    settings = PackSettings(
        folder=tmp_path / "im", file_column="a", caption_column=("b",), key_column="c", prefix="p q"
    )
    pack(table, tmp_path / "out", settings)
    packed = contents(tmp_path / "out" / "p q-000000.tar")
    assert sorted(packed) == ["k-0.png", "k-0.txt", "k-1.jpg", "k-1.txt", "k-2.png", "k-2.txt"]


def test_packing_shards_keeps_samples_unchanged(tmp_path: Path) -> None:
    first = {f"a/{i}.{kind}": os.urandom(i * 9) for i in range(30) for kind in ("png", "txt")}
    second = {f"b{i}.{kind}": os.urandom(i) for i in range(50) for kind in ("json", "txt", "png")}
    second["b50.txt"] = b""  # a sample without other members
    write_tar(tmp_path / "in" / "x.tar", first, "gnu")
    write_tar(tmp_path / "in" / "y.tar", second, "pax")
    pack(tmp_path / "in", tmp_path / "split", PackSettings(per_shard=25))
    assert len(list((tmp_path / "split").glob("*.tar"))) == 4
    assert members(tmp_path / "split") == first | second
    pack(tmp_path / "split", tmp_path / "mixed", PackSettings(shuffle_seed=3))
    assert members(tmp_path / "mixed") == first | second
    pack(str(tmp_path / "in" / "{x,y}.tar"), tmp_path / "merged")
    pack(tmp_path / "in" / "x.tar", tmp_path / "one")
    assert members(tmp_path / "merged") == first | second
    assert members(tmp_path / "one") == first


def test_shuffle_is_a_permutation_determined_by_seed(tmp_path: Path) -> None:
    rows = album(tmp_path, 300)
    table = write_table(tmp_path / "t.csv", rows)

    def order(name: str, seed: int | None) -> list[str]:
        pack(table, tmp_path / name, PackSettings(per_shard=50, shuffle_seed=seed, prefix="p"))
        assert members(tmp_path / name) == expected(tmp_path, rows)
        return [n for n in members(tmp_path / name) if n.endswith(".txt")]

    unshuffled, one, two = order("none", None), order("one", 1), order("two", 2)
    assert unshuffled == sorted(one) == sorted(two)
    assert unshuffled != one != two
    assert order("one again", 1) == one
    assert shard_files(tmp_path / "one again") == shard_files(tmp_path / "one")
    for shard in range(6):  # The mean row of a shuffled shard is 150, standard deviation 12.
        numbers = [int(name[:6]) for name in one[shard * 50 : shard * 50 + 50]]
        assert 90 < np.mean(numbers) < 210


def test_filtered_view_is_packed_like_a_set(tmp_path: Path) -> None:
    rows = album(tmp_path, 12)
    pack(write_table(tmp_path / "t.csv", rows), tmp_path / "set", PackSettings(per_shard=5))
    create_view(open_index(tmp_path / "set", columns=["width"]), "width == 3", tmp_path / "view")
    pack(tmp_path / "view", tmp_path / "out")
    complete = members(tmp_path / "set")
    matching = [f"{i:06d}" for i, row in enumerate(rows) if row["width"] == 3]
    assert members(tmp_path / "out") == {n: d for n, d in complete.items() if n[:6] in matching}


def test_shuffle_is_the_same_for_every_format(tmp_path: Path) -> None:
    rows = album(tmp_path, 150)
    settings = PackSettings(per_shard=40, shuffle_seed=5, prefix="p")
    digests = []
    for kind in ("csv", "jsonl", "parquet", "feather"):
        pack(write_table(tmp_path / f"t.{kind}", rows), tmp_path / kind, settings)
        digests.append({n: d for n, d in shard_files(tmp_path / kind).items() if n != "pack.json"})
    assert digests == [digests[0]] * 4


def test_shards_fill_up_to_the_byte_limit(tmp_path: Path) -> None:
    rows = album(tmp_path, 120)
    (tmp_path / rows[50]["file"]).write_bytes(PNG + bytes(60_000))  # larger than a shard
    for i, row in enumerate(rows):
        row["key"] = f"é{i}" if i % 2 else f"{i}-" + "n" * 150  # names that need pax headers
    limit = 45_000
    settings = PackSettings(shard_bytes=limit, key_column="key")
    pack(write_table(tmp_path / "t.csv", rows), tmp_path / "out", settings)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    keys = [list(dict.fromkeys(n.partition(".")[0] for n in contents(s))) for s in shards]
    assert list(chain(*keys)) == [row["key"] for row in rows]
    assert [rows[50]["key"]] in keys
    for shard, shard_keys in zip(shards, keys, strict=True):
        if shard_keys != [rows[50]["key"]]:
            assert shard.stat().st_size <= limit
    for shard, after in pairwise(shards):  # One more sample would exceed the limit.
        if rows[50]["key"] not in keys[shards.index(after)]:
            both = tmp_path / "both.tar"
            combined = contents(shard)
            first = keys[shards.index(after)][0]
            combined |= {n: d for n, d in contents(after).items() if n.partition(".")[0] == first}
            assert write_tar(both, combined, "pax").stat().st_size > limit


SOURCES = pytest.mark.parametrize("kind", ["files", "parquet", "arrow", "shards"])


@SOURCES
def test_packing_twice_gives_identical_files(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path, 120)
    settings = PackSettings(per_shard=50, prefix="p")
    assert pack(source, tmp_path / "a", settings) == pack(source, tmp_path / "b", settings)
    assert shard_files(tmp_path / "a") == shard_files(tmp_path / "b")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_shuffling_a_table_beyond_memory_limit_fails(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_store, "STORE_BYTES", 10_000)
    table = write_table(tmp_path / f"t.{kind}", album(tmp_path, 300))
    message = pack_error(table, tmp_path / "out", shuffle_seed=1)
    assert "cannot be shuffled" in message
    assert "pack the resulting shards with --shuffle-seed" in message
    pack(table, tmp_path / "ordered")
    pack(tmp_path / "ordered", tmp_path / "mixed", PackSettings(shuffle_seed=1))
    assert members(tmp_path / "mixed") == members(tmp_path / "ordered")


def test_shuffling_a_mapped_arrow_file_needs_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_store, "STORE_BYTES", 10_000)
    rows = album(tmp_path, 100)
    table = write_arrow(tmp_path / "t.arrow", embedded(tmp_path, rows))
    pack(table, tmp_path / "out", PackSettings(shuffle_seed=1))
    assert members(tmp_path / "out") == expected(tmp_path, rows)


def test_packed_shard_holds_regular_files_with_time_zero(tmp_path: Path) -> None:
    pack(make_source("files", tmp_path, 20), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "out-000000.tar") as tar:
        assert {(m.mtime, m.isfile()) for m in tar} == {(0, True)}
