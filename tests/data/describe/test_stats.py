"""What `data stats` tells of real shards, against counts made by hand."""

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
from tarfiles import listed, write_tar

from gigabatch.data.describe.opened import one_line, script_of
from gigabatch.data.describe.rowstats import DISTINCT, Frequencies, Tally, spread, spread_of_counts
from gigabatch.data.describe.stats import SetStats, collect, render
from gigabatch.data.shards.filtered_view import create_view
from gigabatch.data.shards.index import FORMAT, Index, index_from_manifest
from gigabatch.data.shards.index_files import write_index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.scan import IndexSettings
from gigabatch.data.text.captions import CaptionSettings


def test_counts_and_sizes_are_those_of_the_tars(tmp_path: Path) -> None:
    write_samples(tmp_path / "set", 12, 5, seed=3)
    shards = sorted((tmp_path / "set").glob("*.tar"))
    stats = collect(open_index(tmp_path / "set"), TXT)
    assert (stats.shards, stats.samples, stats.opened, stats.bad) == (3, 12, 12, 0)
    assert stats.shard_bytes == sum(shard.stat().st_size for shard in shards)
    assert stats.per_shard is not None
    assert (stats.per_shard.min, stats.per_shard.median, stats.per_shard.max) == (2, 5, 5)
    sizes = sorted(s for shard in shards for name, _, s in listed(shard) if name.endswith(".png"))
    png = next(member for member in stats.members if member.name == "png")
    assert (png.samples, png.lacking, png.first_lacking) == (12, 0, None)
    assert png.bytes is not None
    assert png.bytes.total == sum(sizes)
    assert [png.bytes.min, png.bytes.median, png.bytes.max] == [sizes[0], sizes[5], sizes[11]]
    assert [member.name for member in stats.members] == ["json", "png", "txt"]


def test_members_that_samples_lack_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    members = {"a.png": picture("red"), "a.txt": b"a", "b.txt": b"b", "c.png": picture("blue"),
               "c.txt": b"c", "d.txt": b"d"}  # fmt: skip
    stats = collect(pictured(tmp_path, members), TXT)
    png, txt = stats.members
    assert (png.samples, png.lacking) == (2, 2)
    assert png.first_lacking == f"{tmp_path}/images.tar: sample 'b'"
    assert (txt.samples, txt.lacking) == (4, 0)
    assert stats.images is not None
    assert (stats.images.opened, stats.images.lacking, stats.bad) == (2, 2, 0)
    assert "2 (50.0%) without .png; the first: " in render(stats)


def test_images_are_measured_by_their_headers(tmp_path: Path) -> None:
    images = {
        "a.png": picture("red", size=(300, 100)),
        "b.png": picture(7, "L", (300, 100))[:60],  # the header is whole, the pixels are not
        "c.jpg": picture("red", size=(63, 400), kind="JPEG"),
        "d.webp": picture("red", size=(64, 64), kind="WEBP"),
    }
    found = collect(pictured(tmp_path, images), TXT).images
    assert found is not None
    assert found.opened == 4
    assert found.width is not None
    assert (found.width.min, found.width.median, found.width.max) == (63, 64, 300)
    assert found.height is not None
    assert (found.height.min, found.height.max) == (64, 400)
    assert found.aspect is not None
    assert (found.aspect.min, found.aspect.max) == (0.158, 3.0)
    assert found.formats.top == [("PNG", 2), ("JPEG", 1), ("WEBP", 1)]
    assert found.modes.top == [("RGB", 3), ("L", 1)]
    assert found.sizes.top[0] == ("300 x 100", 2)
    assert found.small == {64: 1, 224: 4}


def test_captions_are_counted_in_characters_and_words(tmp_path: Path) -> None:
    index = captioned(tmp_path, ["a cat", " a cat\n", "two  grey dogs", "été", "\t\n"])
    stats = collect(index, TXT)
    found = stats.captions
    assert found is not None
    assert (found.samples, found.empty, found.lacking) == (4, 1, 0)
    assert found.characters is not None
    assert found.words is not None
    assert (found.characters.total, found.characters.min, found.characters.max) == (27, 3, 14)
    assert (found.words.total, found.words.median, found.words.max) == (8, 2, 3)
    assert (found.distinct, found.repeated, found.top) == (3, 2, [("a cat", 2)])
    assert stats.bad_samples == [
        f"{tmp_path}/captions.tar: sample 's4': its caption (txt) is empty."
    ]
    assert (stats.images, stats.duplicates) == (None, None)


def test_a_caption_repeated_within_one_sample_is_not_another_sample_s(tmp_path: Path) -> None:
    rows = [{"c": ["cat", "cat", "puss"]}, {"c": ["dog", "hound"]}, {"c": ["hound", "bow wow"]}]
    found = collect(captioned(tmp_path, rows), CaptionSettings(member="json", field="c")).captions
    assert found is not None
    assert (found.distinct, found.repeated, found.top) == (5, 2, [("hound", 2)])
    assert found.each is not None
    assert (found.each.total, found.each.min, found.each.max) == (7, 2, 3)
    assert found.keys is None


def test_the_most_frequent_captions_are_those_counted_by_hand(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    captions = [f"number {n}" for n in random.zipf(1.5, 700)]
    counts = Counter(captions)
    found = collect(captioned(tmp_path, captions), TXT).captions
    assert found is not None
    assert found.distinct == len(counts)
    assert found.repeated == sum(n for n in counts.values() if n > 1)
    assert [n for _, n in found.top] == [n for _, n in counts.most_common(10)]
    assert all(counts[caption] == n for caption, n in found.top)


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
    assert "json:names holds: en 100.0%, ru 66.7%, ja 33.3%, zh 33.3%" in render(stats)


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
def test_a_script_is_that_of_most_letters(caption: str, script: str) -> None:
    assert script_of(caption) == script


def test_equal_images_are_found_whatever_they_are_called(tmp_path: Path) -> None:
    red, blue, other = picture("red"), picture("blue"), picture("green")
    write_tar(tmp_path / "0.tar", {"a.png": red, "b.png": other, "c.png": blue})
    write_tar(
        tmp_path / "1.tar", {"d.webp": red, "e.png": red, "f.png": blue, "g.txt": b"", "h.png": red}
    )
    found = collect(open_index(tmp_path), TXT).duplicates
    assert found is not None
    assert (found.samples, found.repeated, found.groups) == (7, 6, 2)
    assert (found.compared, found.different) == (2, 0)
    assert found.examples[0] == (4, [
        f"{tmp_path}/0.tar: sample 'a'", f"{tmp_path}/1.tar: sample 'd'",
        f"{tmp_path}/1.tar: sample 'e'"
    ])  # fmt: skip
    assert found.examples[1][0] == 2


def test_images_with_one_checksum_that_differ_are_told_so(tmp_path: Path) -> None:
    one = picture("red")
    at = len(one) - len(POLYNOMIAL)
    two = one[:at] + bytes(a ^ b for a, b in zip(one[at:], POLYNOMIAL, strict=True))
    assert one != two
    assert google_crc32c.value(one) == google_crc32c.value(two)
    stats = collect(pictured(tmp_path, {"a.png": one, "b.png": two}), TXT)
    assert stats.duplicates is not None
    assert (stats.duplicates.groups, stats.duplicates.different) == (1, 1)
    assert "1 group compared: 1 differed" in render(stats)


def test_without_checksums_equal_images_are_not_sought_and_the_text_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.png": picture("red"), "b.png": picture("red")})
    stats = collect(open_index(tmp_path, settings=IndexSettings(checksums=False)), TXT)
    assert stats.duplicates is None
    assert "Equal images: not sought, since the index has no checksums" in render(stats)


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
    assert "Languages, by field lang: 2 different values; null in 1 (20.0%)\n" in text
    assert "Field score: 3 different values from -2 to 3; null in 1 (20.0%)\n" in text
    assert number.values.distinct == 5
    assert text.endswith("Field id: 5 different values from 0 to 4; null in 0 (0.0%)")


def test_a_tally_tells_a_bounded_number_of_values_apart() -> None:
    tally = Tally()
    for value in range(DISTINCT + 5):
        tally.add(value)
    tally.add(7, 4)
    tally.add(DISTINCT + 3, 9)  # came too late
    found = tally.frequencies(2)
    assert found == Frequencies(DISTINCT + 18, DISTINCT, True, [(7, 5), (0, 1)])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300))
def test_quantiles_are_the_least_numbers_that_so_many_do_not_exceed(numbers: list[int]) -> None:
    found = spread(np.array(numbers))
    assert found is not None
    assert found == spread_of_counts(Counter(numbers))
    shares = [found.median, found.p95, found.p99]
    assert shares == np.quantile(numbers, [0.5, 0.95, 0.99], method="inverted_cdf").tolist()
    assert (found.count, found.total) == (len(numbers), sum(numbers))
    assert (found.min, found.max) == (min(numbers), max(numbers))


def test_a_sample_is_opened_evenly_and_counts_are_of_all(tmp_path: Path) -> None:
    captions = [f"caption {i}" for i in range(100)]
    captions[20] = ""
    captions[21] = ""
    index = captioned(tmp_path, captions)
    calls: list[tuple[int, int]] = []
    stats = collect(index, TXT, 10, lambda done, total: calls.append((done, total)))
    assert (stats.samples, stats.opened, stats.bad) == (100, 10, 1)  # 0, 10, 20, ... 90
    assert stats.members[0].samples == 100
    assert calls == [(0, 10), (10, 10)]
    assert "those of 9 of 10 opened samples, evenly spaced" in render(stats)
    everything = collect(index, TXT)
    assert everything.opened == collect(index, TXT, 0).opened == 100
    assert everything.bad == 2


def test_damaged_samples_are_counted_and_named_and_not_fatal(tmp_path: Path) -> None:
    index = damaged_set(tmp_path)
    stats = collect(index, TXT)
    assert (stats.opened, stats.bad) == (12, 4)
    assert stats.images is not None
    assert (stats.images.opened, stats.captions and stats.captions.samples) == (9, 10)
    assert stats.captions is not None
    assert stats.captions.empty == 1
    three, five, eight, ten = stats.bad_samples
    shard = f"{tmp_path}/0.tar: "
    assert three == f"{shard}sample 's03': the image cannot be read: it is no PNG, JPEG or WebP."
    assert five.startswith(f"{shard}sample 's05': its caption (txt) cannot be read: ")
    assert eight.startswith(f"{shard}sample 's08': the image cannot be read: ")
    assert ten.startswith(f"{shard}at byte {index.span(10, 'png')[0]}: member .png of sample 's10'")
    assert "Not usable: 4 (33.3%) of the samples opened" in render(stats)


def test_ten_damaged_samples_are_named_and_the_others_counted(tmp_path: Path) -> None:
    stats = collect(captioned(tmp_path, [""] * 13), TXT)
    assert (stats.bad, len(stats.bad_samples)) == (13, 10)
    assert stats.captions is not None
    assert stats.captions.empty == 13
    assert "... and 3 more" in render(stats)


def test_a_set_without_that_caption_member_is_described_all_the_same(tmp_path: Path) -> None:
    stats = collect(pictured(tmp_path, {"a.png": picture("red")}), CaptionSettings(member="cap"))
    assert stats.captions is None
    assert "Captions: no sample has a .cap" in render(stats)


def test_a_view_is_described_by_its_own_samples(tmp_path: Path) -> None:
    write_samples(tmp_path / "set", 60, 20, seed=3)
    whole = open_index(tmp_path / "set", columns=("concept",))
    view = create_view(whole, "concept >= 45", tmp_path / "view")
    stats = collect(view, TXT)
    assert (stats.samples, stats.shards, stats.opened) == (5, 1, 5)
    assert stats.columns[0].values.distinct == 5


def test_the_text_is_narrow_and_plain_whatever_a_caption_holds(tmp_path: Path) -> None:
    nasty = "\x1b[31mred\x07\nline\u202e " + "long " * 99
    index = captioned(tmp_path, [nasty, nasty, "plain"])
    text = render(collect(index, TXT))
    assert all(line.isprintable() and len(line) <= 110 for line in text.splitlines())
    assert "2 x [31mred line long long" in text
    assert one_line("a\u200db") == "a\u200db"  # joins letters in Persian, Hindi and emoji


def test_what_was_found_is_plain_json(tmp_path: Path) -> None:
    write_samples(tmp_path, 12, 6, seed=3)
    stats = collect(open_index(tmp_path, columns=("concept", "colour")), TXT)
    tree = json.loads(json.dumps(stats.to_json(), allow_nan=False))
    assert tree["samples"] == 12
    assert tree["images"]["width"]["max"] == 16
    assert tree["columns"][1]["values"]["distinct"] == 12
    assert set(tree) == set(SetStats.__dataclass_fields__)


def tiled(folder: Path, samples: int) -> Index:
    """An index of many samples that all lie in one small shard; each checksum is met often."""
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
def test_a_million_samples_are_described_in_seconds_and_little_memory(tmp_path: Path) -> None:
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
    assert stats.duplicates.by_chance > 100
    assert (stats.columns[0].values.distinct, stats.columns[0].values.more) == (DISTINCT, True)
    assert peak < 100 << 20  # bytes; 67 MiB measured, and 109 MiB of four times as many samples
    assert time.monotonic() - start < 30


def test_a_field_whose_name_has_a_dot_is_found_as_training_finds_it(tmp_path: Path) -> None:
    held: list[str | dict[str, Any]] = [
        {"names.en": {"a": "one", "b": "two"}}, {"names": {"en": "three"}}
    ]  # fmt: skip
    settings = CaptionSettings(member="json", field="names.en")
    found = collect(captioned(tmp_path, held), settings).captions
    assert found is not None
    assert found.samples == 2
    assert found.keys is not None
    assert found.keys.top == [("a", 1), ("b", 1)]
