from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.indexing import open_index
from gigabatch.trainer.evaluation.labels import (
    codes_of,
    field_values,
    flags_of,
    named_classes,
    numbers_of,
)


def test_field_values_are_in_sample_order_and_missing_fields_raise(shards: Path) -> None:
    index = open_index(shards / "val")
    assert field_values(index, "concept") == [number % 50 for number in range(60)]
    with pytest.raises(GigabatchError, match=r"60 of 60 .* 'lang' .*s00000.*colour, con"):
        field_values(index, "lang")
    assert field_values(index, "lang", required=False) == [None] * 60


def test_codes_are_equal_for_equal_values() -> None:
    codes = codes_of([3, "3", True, "cat", "cat", 3]).tolist()
    assert codes[0] == codes[5] == 3
    assert codes[3] == codes[4]
    assert len(set(codes)) == 4


def test_classes_are_named_by_values_a_list_or_a_map(tmp_path: Path) -> None:
    assert named_classes(["b", "a", "b"], None, "kind")[0] == ["a", "b"]
    assert named_classes(["b", "a", "b"], None, "kind")[1].tolist() == [1, 0, 1]
    lines = tmp_path / "names.txt"
    lines.write_text("cat\ndog\n")
    names, classes = named_classes([1, 0, 1], lines, "kind")
    assert (names, classes.tolist()) == (["cat", "dog"], [1, 0, 1])
    table = tmp_path / "names.json"
    table.write_text(json.dumps({"7": "seven", "x": "ex"}))
    names, classes = named_classes(["x", 7], table, "kind")
    assert (names, classes.tolist()) == (["seven", "ex"], [1, 0])


def test_class_name_files_without_the_class_raise(tmp_path: Path) -> None:
    table = tmp_path / "names.json"
    table.write_text(json.dumps({"7": "seven"}))
    with pytest.raises(GigabatchError, match=r"names.json: no class name for kind = 8"):
        named_classes([7, 8], table, "kind")
    table.write_text("{}")
    with pytest.raises(GigabatchError, match="no classes"):
        named_classes([7], table, "kind")
    with pytest.raises(GigabatchError, match="cannot be read"):
        named_classes([7], tmp_path / "none.txt", "kind")


def test_labels_that_are_not_numbers_or_flags_raise(shards: Path) -> None:
    index = open_index(shards / "val")
    assert numbers_of([1, 2.5], "age", index).tolist() == [1, 2.5]
    value: Any
    for value in ("3", True, None, float("nan"), 10**400, [1]):
        with pytest.raises(GigabatchError, match=r"s00001.*'age' is .*, not a finite number"):
            numbers_of([1, value], "age", index)
    assert flags_of([True, 0, 1.0, False], "clean", index).tolist() == [True, False, True, False]
    for value in ("1", 2, None, float("nan")):
        with pytest.raises(GigabatchError, match=r"s00001.*'clean' is .*, not true, false, 1 or 0"):
            flags_of([1, value], "clean", index)
