from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gigabatch.data.decode.fields import Fields, captions_for_tokenizer
from gigabatch.data.errors import BadSample
from gigabatch.data.rng import key
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.text.captions import (
    CaptionSettings,
    MissingCaption,
    choose_caption,
    read_captions,
)

WHERE = "/data/s.tar: sample 'cat'"
TXT = CaptionSettings()
LINES = CaptionSettings(lines=True)


def captions(value: Any, field: str = "c", **options: Any) -> list[str]:
    """Return the captions of a json member that holds `value`."""
    settings = CaptionSettings(member="json", field=field, **options)
    return read_captions(json.dumps(value).encode(), settings, WHERE)


def read_error(data: bytes, settings: CaptionSettings, kind: type[BadSample] = BadSample) -> str:
    """Return the one-line error of reading, which must have exactly type `kind`."""
    with pytest.raises(BadSample) as error:
        read_captions(data, settings, WHERE)
    assert type(error.value) is kind
    message = str(error.value)
    assert message.startswith(f"{WHERE}: its caption ({settings.field or settings.member}) ")
    assert "\n" not in message
    assert len(message) < 300
    return message


def test_text_member_is_one_caption() -> None:
    assert read_captions("  ein Kätzchen\n".encode(), TXT, WHERE) == ["ein Kätzchen"]
    assert read_captions(b"one\ntwo\n", TXT, WHERE) == ["one\ntwo"]


def test_lines_option_makes_every_line_a_caption() -> None:
    assert read_captions(b"one\r\n\n  two \n\t\n", LINES, WHERE) == ["one", "two"]
    assert captions({"c": "one\ntwo"}, lines=True) == ["one", "two"]


def test_byte_order_mark_is_removed() -> None:
    assert read_captions("\ufeffcat".encode(), TXT, WHERE) == ["cat"]
    data = b"\xef\xbb\xbf" + b'{"c": "cat"}'
    assert read_captions(data, CaptionSettings(member="json", field="c"), WHERE) == ["cat"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", ["a cat"]),
        (["a cat", " it sits "], ["a cat", "it sits"]),
        ({"en": "cat", "de": "Katze"}, ["Katze", "cat"]),
        (["a cat", "", None, " \n"], ["a cat"]),
        ({"en": "cat", "de": None, "fr": ""}, ["cat"]),
        (["same", "same"], ["same", "same"]),
    ],
)
def test_json_field_may_be_text_list_or_mapping(value: Any, expected: list[str]) -> None:
    assert captions({"c": value, "other": "no"}) == expected


@given(st.permutations(["en", "de", "fr", "zh", "sw"]))
def test_mapping_is_sorted_by_name(names: list[str]) -> None:
    assert captions({"c": {name: name.upper() for name in names}}) == ["DE", "EN", "FR", "SW", "ZH"]


def test_path_reads_nested_mappings() -> None:
    record = {"names": {"en": "cat", "de": ["Katze", "Mieze"]}, "names.fr": "chat"}
    assert captions(record, "names.en") == ["cat"]
    assert captions(record, "names.de") == ["Katze", "Mieze"]
    assert captions({"a": {"b": {"c": "deep"}}}, "a.b.c") == ["deep"]
    assert captions(record, "names.fr") == ["chat"]  # a field name may contain a dot


@pytest.mark.parametrize("data", [b"", b" \n\t", "\ufeff".encode()])
@pytest.mark.parametrize("settings", [TXT, LINES])
def test_empty_text_raises_missing_caption(data: bytes, settings: CaptionSettings) -> None:
    assert read_error(data, settings, MissingCaption).endswith("is empty.")


@pytest.mark.parametrize(
    "record", [{}, {"a": None}, {"a": {}}, {"a": {"b": None}}, {"a": {"b": ""}}, {"a": {"b": []}},
               {"a": {"b": [" ", None]}}, {"a": {"b": {}}}, {"a": {"b": {"en": ""}}}, None],
)  # fmt: skip
def test_missing_or_empty_json_field_raises_missing_caption(record: Any) -> None:
    settings = CaptionSettings(member="json", field="a.b")
    assert read_error(json.dumps(record).encode(), settings, MissingCaption).endswith("is empty.")


@pytest.mark.parametrize(
    "record", [3, [], "text", {"a": 3}, {"a": "text"}, {"a": ["x"]}, {"a": {"b": 3}},
               {"a": {"b": True}}, {"a": {"b": ["x", 3]}}, {"a": {"b": {"en": ["x"]}}},
               {"a": {"b": "x" * 9999}, "a.b": [["x" * 9999]]}],
)  # fmt: skip
def test_json_field_that_is_not_text_raises(record: Any) -> None:
    read_error(json.dumps(record).encode(), CaptionSettings(member="json", field="a.b"))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b'{"a": NaN', b"[" * 100_000, b'{"a": {"b": "\xe4"}}']
)
def test_invalid_json_raises(data: bytes) -> None:
    message = read_error(data, CaptionSettings(member="json", field="a.b"))
    assert "cannot be read" in message


def test_text_that_is_not_utf8_raises() -> None:
    assert "cannot be read" in read_error(b"long " * 1000 + "Kätzchen".encode("latin-1"), TXT)


def test_half_a_surrogate_pair_raises() -> None:
    settings = CaptionSettings(member="json", field="c")
    assert "surrogate" in read_error(b'{"c": ["fine", "cat \\ud83d"]}', settings)
    assert read_captions(b'{"c": "\\ud83d\\ude00"}', settings, WHERE) == ["\U0001f600"]


@given(st.binary(max_size=60))
def test_any_bytes_give_captions_or_a_clear_error(data: bytes) -> None:
    for settings in (LINES, CaptionSettings(member="json", field="a.b")):
        try:
            texts = read_captions(data, settings, WHERE)
        except BadSample:
            continue
        assert texts
        assert all(text == text.strip() != "" for text in texts)


def test_choose_caption_depends_on_key_and_is_even() -> None:
    names = ["a", "b", "c"]
    rng_keys = [key(7, "caption", step, 5) for step in range(3000)]
    chosen = [choose_caption(names, rng_key) for rng_key in rng_keys]
    assert chosen == [choose_caption(names, rng_key) for rng_key in rng_keys]
    for count in Counter(chosen).values():
        assert abs(count / 3000 - 1 / 3) < 5 * (2 / 9 / 3000) ** 0.5
    assert len(Counter(pairwise(chosen))) == 9
    assert choose_caption(["only"], 3) == "only"


def test_golden_choices() -> None:
    chosen = "".join(choose_caption(list("abcdefgh"), rng_key) for rng_key in range(16))
    assert chosen == "baaeegcbgfghchfd"


@pytest.mark.parametrize("settings", [{"choose": "last"}, {"most": 0}, {"lang": "en"}])
def test_invalid_settings_raise_validation_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CaptionSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["one a", "two a"]),
        (
            {"choose": "random"},
            ["one a", "one b", "one c", "two a"],
        ),  # may draw every one
        ({"choose": "all", "most": 2}, ["one a", "one b", "two a"]),
    ],
)
def test_captions_for_tokenizer_include_every_caption_a_run_may_use(
    settings: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    samples = [{"c": [f"one {letter}" for letter in "abc"]}, {"c": "two a"}]
    with wds.TarWriter(str(tmp_path / "a.tar"), mtime=0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number}", "json": sample})
    fields = Fields(text=CaptionSettings(member="json", field="c", **settings))
    assert list(captions_for_tokenizer([open_index(tmp_path)], fields, 10)) == expected
