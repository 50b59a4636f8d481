"""Hints to pack sources that are not shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.tables import SUFFIXES
from gigabatch.data.shards import pack_hint as module
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.pack_hint import pack_hint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (
        "csv/a.csv", "parquet/data/a.parquet", "images/cat/1.jpg", "set.zip", "zips/a.zip",
        "shards/a.tar", "shards/meta.csv", "nested/train/a.tar", "nested/meta.csv",
        "view/manifest.json", "view/index.parquet", "index/a.tar", "index/.gigabatch/i.parquet",
        "notes/readme.txt", "a b/t.tsv",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("csv", "gigabatch data pack {}/csv OUT"),
        ("csv/a.csv", "gigabatch data pack {}/csv/a.csv OUT"),
        ("csv/*.csv", "gigabatch data pack '{}/csv/*.csv' OUT"),
        ("parquet", "gigabatch data pack {}/parquet/data OUT"),
        ("parquet/data/*.parquet", "gigabatch data pack '{}/parquet/data/*.parquet' OUT"),
        ("parquet/data/part-{0..9}.PARQUET", "pack '{}/parquet/data/part-{0..9}.PARQUET' OUT"),
        ("a b", "gigabatch data pack '{}/a b' OUT"),
        ("images", "`gigabatch data pack TABLE OUT`"),
        ("images/*/*.jpg", "This is a pattern of image files"),
        ("images/*/*.JPG", "`gigabatch data pack TABLE OUT`"),
        ("images/cat/*.{png,jpg}", "`gigabatch data pack TABLE OUT`"),
        ("images/cat/*", "`gigabatch data pack TABLE OUT`"),
        ("images/cat/1.jpg", "This is an image file"),
        ("*.zip", "Unzip it"),
        ("csv/*.{csv,tsv}", "pack '{}/csv/*.{csv,tsv}' OUT"),
        ("set.zip", "Unzip it, then write shards with `gigabatch data pack TABLE OUT`"),
        ("zips", "Unzip it"),
    ],
)
def test_hint_contains_the_pack_command(source: str, command: str, root: Path) -> None:
    hint = pack_hint(f"{root}/{source}")
    assert hint is not None
    assert command.replace("{}", str(root)) in hint


@pytest.mark.parametrize(
    "source",
    [
        "shards",
        "nested",
        "view",
        "index",
        "notes",
        "missing",
        "shards/*.tar",
        "shards/a.tar",
        "shards/a*",
        "shards/{a,b}.tar",
        "missing/*",
    ],
)
def test_other_sources_get_no_hint(source: str, root: Path) -> None:
    assert pack_hint(f"{root}/{source}") is None


def test_hint_for_remote_tables_asks_for_a_download() -> None:
    assert "Download them" in str(pack_hint("hf://datasets/a/b/*.parquet"))
    assert "List them in a table" in str(pack_hint("https://host/a/*.jpg"))
    assert pack_hint("s3://bucket/*.tar") is None


def test_hint_and_pack_use_the_same_table_suffixes() -> None:
    assert module.SUFFIXES is SUFFIXES


@pytest.mark.parametrize("source", ["csv", "csv/*.csv", "set.zip", "images", "images/*/*.jpg"])
def test_indexing_a_source_to_pack_raises_with_the_hint(source: str, root: Path) -> None:
    with pytest.raises(GigabatchError, match="gigabatch data pack"):
        open_index(f"{root}/{source}")
