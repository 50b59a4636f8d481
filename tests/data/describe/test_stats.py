"""Statistics of real shards, compared with manual counts."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sets import POLYNOMIAL, TXT, captioned, damaged_set, picture, pictured
from support import write_samples
from tarfiles import stdlib_members, write_tar

from gigabatch.data.describe.content_stats import one_line, script_of
from gigabatch.data.describe.index_stats import (
    MAX_DISTINCT,
    Frequencies,
    Tally,
    distribution,
    distribution_of_counts,
)
from gigabatch.data.describe.stats import SetStats, collect, render
from gigabatch.data.shards.filtered_view import create_view
from gigabatch.data.shards.index import FORMAT, Index, index_from_manifest
from gigabatch.data.shards.index_files import write_index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.scan import IndexSettings
from gigabatch.data.text.captions import CaptionSettings


def test_counts_and_sizes_match_the_tar_files(tmp_path: Path) -> None:
    write_samples(tmp_path / "set", 12, 5, seed=3)
    shards = sorted((tmp_path / "set").glob("*.tar"))
    stats = collect(open_index(tmp_path / "set"), TXT)
    assert (stats.shards, stats.samples, stats.opened, stats.bad) == (3, 12, 12, 0)
    assert stats.shard_bytes == sum(shard.stat().st_size for shard in shards)
    assert stats.per_shard is not None
    assert (stats.per_shard.min, stats.per_shard.median, stats.per_shard.max) == (2, 5, 5)
    sizes = sorted(
        s for shard in shards for name, _, s in stdlib_members(shard) if name.endswith(".png")
    )
    png = next(member for member in stats.members if member.name == "png")
    assert (png.samples, png.missing, png.first_missing) == (12, 0, None)
    assert png.bytes is not None
    assert png.bytes.total == sum(sizes)
    assert [png.bytes.min, png.bytes.median, png.bytes.max] == [sizes[0], sizes[5], sizes[11]]
    assert [member.name for member in stats.members] == ["json", "png", "txt"]


def test_missing_members_are_counted_and_first_is_named(tmp_path: Path) -> None:
    members = {"a.png": picture("red"), "a.txt": b"a", "b.txt": b"b", "c.png": picture("blue"),
               "c.txt": b"c", "d.txt": b"d"}  # fmt: skip
    stats = collect(pictured(tmp_path, members), TXT)
    png, txt = stats.members
    assert (png.samples, png.missing) == (2, 2)
    assert png.first_missing == f"{tmp_path}/images.tar: sample 'b'"
    assert (txt.samples, txt.missing) == (4, 0)
    assert stats.images is not None
    assert (stats.images.opened, stats.images.missing, stats.bad) == (2, 2, 0)
    assert "2 (50.0%) without .png; first: " in render(stats)


def test_image_stats_come_from_headers(tmp_path: Path) -> None:
    images = {
        "a.png": picture("red", size=(300, 100)),
        "b.png": picture(7, "L", (300, 100))[:60],  # The header is complete, the pixels are not.
        "c.jpg": picture("red", size=(63, 400), kind="JPEG"),
        "d.webp": picture("red", size=(64, 64), kind="WEBP"),
    }
    stats = collect(pictured(tmp_path, images), TXT).images
    assert stats is not None
    assert stats.opened == 4
    assert stats.width is not None
    assert (stats.width.min, stats.width.median, stats.width.max) == (63, 64, 300)
    assert stats.height is not None
    assert (stats.height.min, stats.height.max) == (64, 400)
    assert stats.aspect is not None
    assert (stats.aspect.min, stats.aspect.max) == (0.158, 3.0)
    assert stats.formats.top == [("PNG", 2), ("JPEG", 1), ("WEBP", 1)]
    assert stats.modes.top == [("RGB", 3), ("L", 1)]
    assert stats.sizes.top[0] == ("300 x 100", 2)
    assert stats.small == {64: 1, 224: 4}


def test_caption_lengths_are_counted_in_characters_and_words(tmp_path: Path) -> None:
    index = captioned(tmp_path, ["a cat", " a cat\n", "two  grey dogs", "été", "\t\n"])
    stats = collect(index, TXT)
    counts = stats.captions
    assert counts is not None
    assert (counts.samples, counts.empty, counts.missing) == (4, 1, 0)
    assert counts.characters is not None
    assert counts.words is not None
    assert (counts.characters.total, counts.characters.min, counts.characters.max) == (27, 3, 14)
    assert (counts.words.total, counts.words.median, counts.words.max) == (8, 2, 3)
    assert (counts.distinct, counts.repeated, counts.top) == (3, 2, [("a cat", 2)])
    assert stats.bad_samples == [
        f"{tmp_path}/captions.tar: sample 's4': its caption (txt) is empty."
    ]
    assert (stats.images, stats.duplicates) == (None, None)


def test_caption_repeated_within_a_sample_is_not_shared(tmp_path: Path) -> None:
    rows = [{"c": ["cat", "cat", "puss"]}, {"c": ["dog", "hound"]}, {"c": ["hound", "bow wow"]}]
    stats = collect(captioned(tmp_path, rows), CaptionSettings(member="json", field="c")).captions
    assert stats is not None
    assert (stats.distinct, stats.repeated, stats.top) == (5, 2, [("hound", 2)])
    assert stats.per_sample is not None
    assert (stats.per_sample.total, stats.per_sample.min, stats.per_sample.max) == (7, 2, 3)
    assert stats.keys is None


def test_most_frequent_captions_match_manual_count(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    captions = [f"number {n}" for n in random.zipf(1.5, 700)]
    counts = Counter(captions)
    stats = collect(captioned(tmp_path, captions), TXT).captions
    assert stats is not None
    assert stats.distinct == len(counts)
    assert stats.repeated == sum(n for n in counts.values() if n > 1)
    assert [n for _, n in stats.top] == [n for _, n in counts.most_common(10)]
    assert all(counts[caption] == n for caption, n in stats.top)


def test_translations_are_counted_by_language_and_script(tmp_path: Path) -> None:
    rows: list[str | dict[str, Any]] = [
        {"names": {"en": "cat", "ru": "кот", "ja": "ねこ", "zh": "猫", "xx": " "}},
        {"names": {"en": "dog", "ru": "собака"}},
        {"names": {"en": "1 2"}},
    ]
    index = captioned(tmp_path, rows)
    stats = collect(index, CaptionSettings(member="json", field="names"))
    assert stats.captions is not None
    assert stats.captions.keys is not None
    assert stats.captions.keys.top == [("en", 3), ("ru", 2), ("ja", 1), ("zh", 1)]
    assert stats.captions.scripts.top == [
        ("Cyrillic", 2), ("Latin", 2), ("Han", 1), ("Hiragana", 1), ("no letters", 1)
    ]  # fmt: skip
    assert "json:names contains: en 100.0%, ru 66.7%, ja 33.3%, zh 33.3%" in render(stats)


@pytest.mark.parametrize(
    ("caption", "script"),
    [
        ("été 12", "Latin"),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER W}", "Latin"),
        ("Ω και", "Greek"),
        ("кот cat и пёс", "Cyrillic"),
        ("قطة", "Arabic"),
        ("猫と犬猿", "Han"),
        ("コーヒー", "Katakana"),
        ("고양이", "Hangul"),
        ("बिल्ली", "Devanagari"),
        ("12 %", "no letters"),
        ("☕", "no letters"),
    ],
)
def test_script_is_the_most_frequent_of_the_letters(caption: str, script: str) -> None:
    assert script_of(caption) == script


def test_equal_images_are_found_across_names_and_types(tmp_path: Path) -> None:
    red, blue, other = picture("red"), picture("blue"), picture("green")
    write_tar(tmp_path / "0.tar", {"a.png": red, "b.png": other, "c.png": blue})
    write_tar(
        tmp_path / "1.tar", {"d.webp": red, "e.png": red, "f.png": blue, "g.txt": b"", "h.png": red}
    )
    duplicates = collect(open_index(tmp_path), TXT).duplicates
    assert duplicates is not None
    assert (duplicates.samples, duplicates.repeated, duplicates.groups) == (7, 6, 2)
    assert (duplicates.compared, duplicates.different) == (2, 0)
    assert duplicates.examples[0] == (4, [
        f"{tmp_path}/0.tar: sample 'a'", f"{tmp_path}/1.tar: sample 'd'",
        f"{tmp_path}/1.tar: sample 'e'"
    ])  # fmt: skip
    assert duplicates.examples[1][0] == 2


def test_different_images_with_equal_checksum_are_reported(tmp_path: Path) -> None:
    one = picture("red")
    end = len(one) - len(POLYNOMIAL)
    two = one[:end] + bytes(a ^ b for a, b in zip(one[end:], POLYNOMIAL, strict=True))
    assert one != two
    assert google_crc32c.value(one) == google_crc32c.value(two)
    stats = collect(pictured(tmp_path, {"a.png": one, "b.png": two}), TXT)
    assert stats.duplicates is not None
    assert (stats.duplicates.groups, stats.duplicates.different) == (1, 1)
    assert "1 group compared: 1 differ" in render(stats)


def test_index_without_checksums_skips_duplicate_search(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.png": picture("red"), "b.png": picture("red")})
    stats = collect(open_index(tmp_path, settings=IndexSettings(checksums=False)), TXT)
    assert stats.duplicates is None
    assert "Equal images: not searched, because the index has no checksums" in render(stats)


def test_indexed_fields_are_counted(tmp_path: Path) -> None:
    values = [("en", 3), ("de", 1), (None, 3), ("en", None), ("en", -2)]
    rows = [{"lang": lang, "score": n, "id": i} for i, (lang, n) in enumerate(values)]
    write_tar(
        tmp_path / "0.tar", [(f"{i}.json", json.dumps(r).encode()) for i, r in enumerate(rows)]
    )
    index = open_index(tmp_path, columns=("lang", "score", "id"))
    stats = collect(index, TXT)
    lang, score, number = stats.columns
    assert (lang.name, lang.nulls, lang.min) == ("lang", 1, None)
    assert lang.values == Frequencies(4, 2, False, [("en", 3), ("de", 1)])
    assert (score.nulls, score.min, score.max) == (1, -2, 3)
    assert score.values.top == [(3, 2), (-2, 1), (1, 1)]
    text = render(stats)
    assert "Languages, field lang: 2 distinct values; null in 1 (20.0%)\n" in text
    assert "Field score: 3 distinct values from -2 to 3; null in 1 (20.0%)\n" in text
    assert number.values.distinct == 5
    assert text.endswith("Field id: 5 distinct values from 0 to 4; null in 0 (0.0%)")


def test_tally_limits_number_of_distinct_values() -> None:
    tally = Tally()
    for value in range(MAX_DISTINCT + 5):
        tally.add(value)
    tally.add(7, 4)
    tally.add(MAX_DISTINCT + 3, 9)  # not counted separately
    top = [(7, 5), (0, 1)]
    assert tally.frequencies(2) == Frequencies(MAX_DISTINCT + 18, MAX_DISTINCT, True, top)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300))
def test_quantiles_match_numpy_inverted_cdf(numbers: list[int]) -> None:
    result = distribution(np.array(numbers))
    assert result is not None
    assert result == distribution_of_counts(Counter(numbers))
    quantiles = [result.median, result.p95, result.p99]
    assert quantiles == np.quantile(numbers, [0.5, 0.95, 0.99], method="inverted_cdf").tolist()
    assert (result.count, result.total) == (len(numbers), sum(numbers))
    assert (result.min, result.max) == (min(numbers), max(numbers))


def test_sampling_is_even_and_counts_cover_all_samples(tmp_path: Path) -> None:
    captions = [f"caption {i}" for i in range(100)]
    captions[20] = ""
    captions[21] = ""
    index = captioned(tmp_path, captions)
    calls: list[tuple[int, int]] = []
    stats = collect(index, TXT, 10, lambda done, total: calls.append((done, total)))
    assert (stats.samples, stats.opened, stats.bad) == (100, 10, 1)  # samples 0, 10, 20, ... 90
    assert stats.members[0].samples == 100
    assert calls == [(0, 10), (10, 10)]
    assert "Captions (txt): 9 of 10 opened samples, evenly spaced" in render(stats)
    everything = collect(index, TXT)
    assert everything.opened == collect(index, TXT, 0).opened == 100
    assert everything.bad == 2


def test_damaged_samples_are_counted_and_named(tmp_path: Path) -> None:
    index = damaged_set(tmp_path)
    stats = collect(index, TXT)
    assert (stats.opened, stats.bad) == (12, 4)
    assert stats.images is not None
    assert (stats.images.opened, stats.captions and stats.captions.samples) == (9, 10)
    assert stats.captions is not None
    assert stats.captions.empty == 1
    three, five, eight, ten = stats.bad_samples
    shard = f"{tmp_path}/0.tar: "
    assert three == f"{shard}sample 's03': the image cannot be read: not a PNG, JPEG or WebP file."
    assert five.startswith(f"{shard}sample 's05': its caption (txt) cannot be read: ")
    assert eight.startswith(f"{shard}sample 's08': the image cannot be read: ")
    assert ten.startswith(
        f"{shard}at byte {index.member_span(10, 'png')[0]}: member .png of sample 's10'"
    )
    assert "Unusable: 4 (33.3%) of the opened samples" in render(stats)


def test_at_most_ten_damaged_samples_are_named(tmp_path: Path) -> None:
    stats = collect(captioned(tmp_path, [""] * 13), TXT)
    assert (stats.bad, len(stats.bad_samples)) == (13, 10)
    assert stats.captions is not None
    assert stats.captions.empty == 13
    assert "... and 3 more" in render(stats)


def test_set_without_caption_member_is_described(tmp_path: Path) -> None:
    stats = collect(pictured(tmp_path, {"a.png": picture("red")}), CaptionSettings(member="cap"))
    assert stats.captions is None
    assert "Captions: no sample has a .cap" in render(stats)


def test_filtered_view_is_described_by_its_samples(tmp_path: Path) -> None:
    write_samples(tmp_path / "set", 60, 20, seed=3)
    index = open_index(tmp_path / "set", columns=("concept",))
    view = create_view(index, "concept >= 45", tmp_path / "view")
    stats = collect(view, TXT)
    assert (stats.samples, stats.shards, stats.opened) == (5, 1, 5)
    assert stats.columns[0].values.distinct == 5


def test_text_is_printable_and_narrow_for_any_caption(tmp_path: Path) -> None:
    unprintable = "\x1b[31mred\x07\nline\u202e " + "long " * 99
    index = captioned(tmp_path, [unprintable, unprintable, "plain"])
    text = render(collect(index, TXT))
    assert all(line.isprintable() and len(line) <= 110 for line in text.splitlines())
    assert "2 x [31mred line long long" in text
    assert one_line("a\u200db") == "a\u200db"  # joins letters in Persian and Hindi, and emoji


def test_stats_convert_to_json(tmp_path: Path) -> None:
    write_samples(tmp_path, 12, 6, seed=3)
    stats = collect(open_index(tmp_path, columns=("concept", "colour")), TXT)
    tree = json.loads(json.dumps(stats.to_json(), allow_nan=False))
    assert tree["samples"] == 12
    assert tree["images"]["width"]["max"] == 16
    assert tree["columns"][1]["values"]["distinct"] == 12
    assert set(tree) == set(SetStats.__dataclass_fields__)


def tiled(folder: Path, samples: int) -> Index:
    """Build an index of many samples in one small shard, so that each checksum occurs often."""
    write_samples(folder / "set", 1024, 1024, seed=5)
    real = open_index(folder / "set")
    table = real.table.append_column("id", pa.array(range(1024))).combine_chunks()
    copies = samples // 1024
    shards = [{"name": f"{i}", "bytes": 1, "version": "", "samples": 1024, "digest": ""}
              for i in range(copies)]  # fmt: skip
    manifest = {"format": FORMAT, "settings": {"columns": ["id"]}, "shards": shards, "digest": ""}

    def tables() -> Any:
        for copy in range(copies):
            ids = pa.array(np.arange(copy * 1024, (copy + 1) * 1024))
            yield table.set_column(table.num_columns - 1, "id", ids)

    home = folder / "tiled"
    write_index(tables(), table.schema, manifest, home)
    return index_from_manifest("tiled", home, manifest, [real.shards[0].name] * copies)


@pytest.mark.slow
def test_million_samples_are_described_within_time_and_memory(tmp_path: Path) -> None:
    index = tiled(tmp_path, 1 << 20)
    start = time.monotonic()
    tracemalloc.start()
    try:
        stats = collect(index, TXT, 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert stats.samples == 1 << 20
    assert stats.duplicates is not None
    assert (stats.duplicates.groups, stats.duplicates.repeated) == (1024, 1 << 20)
    assert stats.duplicates.chance_pairs > 100
    ids = stats.columns[0].values
    assert (ids.distinct, ids.truncated) == (MAX_DISTINCT, True)
    assert peak < 100 << 20  # measured: 67 MiB; with four times as many samples, 109 MiB
    assert time.monotonic() - start < 30


def test_caption_field_with_dot_in_name_is_found(tmp_path: Path) -> None:
    rows: list[str | dict[str, Any]] = [
        {"names.en": {"a": "one", "b": "two"}}, {"names": {"en": "three"}}
    ]  # fmt: skip
    settings = CaptionSettings(member="json", field="names.en")
    stats = collect(captioned(tmp_path, rows), settings).captions
    assert stats is not None
    assert stats.samples == 2
    assert stats.keys is not None
    assert stats.keys.top == [("a", 1), ("b", 1)]
