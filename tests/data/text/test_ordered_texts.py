"""Order has meaning: where the first text of a list is the positive, no other text replaces it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gigabatch.data.decode.fields import Fields
from gigabatch.data.errors import BadSample
from gigabatch.data.text.captions import CaptionSettings, ExtraText, MissingCaption, read_captions

WHERE = "/data/s.tar: sample 'q7'"
MISSING, REFUSED = "first position", "is a mapping, which has no order"


def fields(**options: Any) -> Fields:
    settings = {"choose": "all", "most": 3, **options}
    return Fields(text=CaptionSettings(field="passages", **settings), ordered=("text", "query"))


def decoded(value: Any, of: Fields) -> Any:
    return of.decode({"json": json.dumps({"passages": value}).encode()}, WHERE, 5)["text"]


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        (["yes", "no", "never"], {}, ["yes", "no", "never"]),
        (["yes", None, "never"], {}, ["yes", "never"]),
        (["yes", "", " ", "no"], {}, ["yes", "no"]),
        (["yes", "", "a", "b", "c"], {}, ["yes", "a", "b"]),
        (["yes", "no"], {"most": 1}, ["yes"]),
        (["yes", "no"], {"choose": "first"}, "yes"),
        ("yes", {}, ["yes"]),
        ("yes\nno\n\nnever", {"lines": True}, ["yes", "no", "never"]),
        (["no text at", "first"], {"choose": "random"}, "no text at"),
        (["", "any may be the positive"], {"choose": "random"}, "any may be the positive"),
        ([None, "no", "never"], {}, MISSING),
        (["", "no"], {}, MISSING),
        (["\u00a0\t", "no"], {}, MISSING),
        (["", "no"], {"choose": "first"}, MISSING),
        ("\nno\nnever", {"lines": True}, MISSING),
        ("  \r\nno", {"lines": True, "choose": "first"}, MISSING),
        ([None, None], {}, "is empty"),
        ({"good": "yes", "bad": "no"}, {}, REFUSED),
        ({"0": "yes"}, {"choose": "first"}, REFUSED),
        ([["yes"], "no"], {}, "is not text"),
        ([7, "no"], {}, "is not text"),
    ],
)
def test_first_text_is_the_positive(value: Any, options: dict[str, Any], expected: Any) -> None:
    if isinstance(expected, list) or expected in value:
        assert decoded(value, fields(**options)) == expected
        return
    with pytest.raises(BadSample, match=expected) as error:
        decoded(value, fields(**options))
    assert str(error.value).startswith(f"{WHERE}: its caption (passages) is ")
    assert isinstance(error.value, MissingCaption) == (expected in (MISSING, "is empty"))


def test_masked_sample_lacks_its_texts_and_keeps_its_query() -> None:
    of = Fields(
        text=CaptionSettings(field="passages", choose="all"),
        more={"query": ExtraText(field="query")},
        ordered=("query", "text"),
        allow_missing=True,
    )
    record = {"passages": ["", "no"], "query": "what?"}
    assert of.decode({"json": json.dumps(record).encode()}, WHERE, None) == {"query": "what?"}
    record = {"passages": ["yes"], "query": ["", "a negative, not the query"]}
    assert of.decode({"json": json.dumps(record).encode()}, WHERE, None) == {"text": ["yes"]}


def test_lists_without_order_skip_empty_texts_as_before() -> None:
    of = Fields(text=CaptionSettings(field="passages", choose="all"))
    assert decoded(["", "a", None, "b"], of) == ["a", "b"]
    assert decoded({"en": "a", "de": ""}, of) == ["a"]
    assert read_captions(b"\nsecond", CaptionSettings(lines=True), WHERE) == ["second"]


def test_message_names_the_key_that_masks_missing_texts() -> None:
    of = Fields(text=CaptionSettings(), missing_hint="Set data.missing=mask.")
    with pytest.raises(MissingCaption, match=r"\(txt\) is empty. Set data.missing=mask.$"):
        of.decode({"txt": b" \n"}, WHERE, None)
