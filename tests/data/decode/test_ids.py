"""Missing is not a value: ids are equal where values are, and a missing value equals nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tarfiles import write_tar

from gigabatch.data.decode.fields import Fields
from gigabatch.data.decode.ids import code_of, flag_of, is_missing, number_of, unknown_code
from gigabatch.data.errors import BadSample, GigabatchError
from gigabatch.data.order.mixture import SAMPLE_BITS
from gigabatch.data.shards.field_check import check_fields
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.sources import indexed_codes, rows_without_value

NAN = float("nan")
MISSING = [None, NAN, float("inf"), -float("inf"), "", "  ", "\t\n", [], {}, [None, ""], {"a": NAN}]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([7, 7.0])
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=2), v),
    max_leaves=4,
)


def write_set(folder: Path, values: Sequence[Any]) -> Path:
    """Write one sample per value `x`; an Ellipsis gives a json member without the field."""
    members = {}
    for row, value in enumerate(values):
        record = {} if value is ... else {"x": value}
        members |= {f"s{row}.txt": b"t", f"s{row}.json": json.dumps(record).encode()}
    write_tar(folder / "a.tar", members)
    return folder


def both_paths(folder: Path, values: Sequence[Any], **options: Any) -> list[list[Any]]:
    """Return the codes or errors of every sample, from the json and from the index."""
    write_set(folder, values)
    fields = Fields(columns=("x",), **options)
    results = []
    for index in (open_index(folder), open_index(folder, columns=["x"])):
        results.append([])
        for row, value in enumerate(values):
            raw = {"json": json.dumps({} if value is ... else {"x": value}).encode()}
            try:
                code: Any = fields.column_values(3, index, row, raw, f"sample {row}")["x"]
            except BadSample as error:
                code = str(error)
            results[-1].append(code)
    return results


TABLES: dict[str, list[Any]] = {
    "numbers": [7, 7.0, 7.5, -0.0, 0, None, NAN, -1, 1 << 53, 3],
    "integers": [-1, 5, None, (1 << 62) - 1, -1],
    "large": [1 << 70, 10**400, -(1 << 62), None, 1],
    "texts": ["a", "", " ", "A", None, "None", "null", "cat \ud83d", "NaN"],
    "flags": [True, False, None, True],
    "mixed": [True, 1, "1", 1.0, [7], [7.0], {"a": 7.0}, {"a": 7}, [], {}, None, NAN, ["", None]],
    "absent": [..., 3, ...],
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("missing_ids", ["error", "unique"])
def test_codes_are_the_same_with_and_without_an_index_column(
    name: str, missing_ids: Any, tmp_path: Path
) -> None:
    values = TABLES[name]
    from_json, from_index = both_paths(tmp_path, values, missing_ids=missing_ids)
    assert from_json == from_index
    for row, value in enumerate(values):
        lacks = value is ... or is_missing(value)
        if lacks and missing_ids == "error":
            assert from_json[row].startswith(f"sample {row}: its json member has no 'x'")
            assert "data.missing_ids=unique" in from_json[row]
        elif lacks:
            assert from_json[row] == unknown_code(3 << SAMPLE_BITS | row)
            assert from_json.count(from_json[row]) == 1
    whole = indexed_codes(open_index(tmp_path, columns=["x"]), "x", 3)
    if missing_ids == "unique":
        assert whole.tolist() == from_json


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (7, 7.0, True), ([7, "a"], [7.0, "a"], True), ({"a": [1.0]}, {"a": [1]}, True),
        (0, -0.0, True), (True, 1, False), (False, 0, False), (True, 1.0, False), (1, "1", False),
        ("a", "A", False), ([1], 1, False), ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ([True], [1], False), ("None", "null", False), (1 << 60, (1 << 60) + 1, False),
    ],
)  # fmt: skip
def test_equal_values_have_one_id(one: Any, other: Any, equal: bool) -> None:
    assert (code_of(one) == code_of(other)) is equal


@pytest.mark.parametrize("value", MISSING)
def test_value_that_identifies_nothing_is_missing(value: Any) -> None:
    assert is_missing(value)
    assert not is_missing([value, 0])


@given(VALUES, st.integers(0, (1 << 60) - 1))
def test_code_of_an_unknown_is_no_code_of_a_value(value: Any, number: int) -> None:
    assert -(1 << 63) <= unknown_code(number) < -(1 << 62) < code_of(value) < 1 << 63


def test_first_version_keeps_the_codes_of_old_runs(tmp_path: Path) -> None:
    from_json, from_index = both_paths(tmp_path, [7, 7.5, None, 7], version=1)
    assert from_index[2] == -1
    assert "has no 'x'" in from_json[2]
    assert from_json[0] == from_json[3] == 7
    assert from_index[0] == from_index[3] != 7  # the column is float64
    index = open_index(tmp_path, columns=["x"])
    assert indexed_codes(index, "x", 0, 1).tolist() == from_index


def test_index_without_any_value_has_unique_codes(tmp_path: Path) -> None:
    index = open_index(write_set(tmp_path, [None, ..., None]), columns=["x"])
    assert rows_without_value(index, "x").tolist() == [0, 1, 2]
    assert len(set(indexed_codes(index, "x").tolist())) == 3


@pytest.mark.parametrize(
    ("value", "flag"),
    [(True, 1), (1, 1), (1.0, 1), (False, 0), (0, 0), (2, None), ("yes", None), (None, None),
     ("0", None), (NAN, None), ([], None)],
)  # fmt: skip
def test_flag_is_true_false_1_or_0(value: Any, flag: int | None, tmp_path: Path) -> None:
    assert flag_of(value) == flag
    for result in both_paths(tmp_path, [value, 1], flags=("x",)):
        assert result[0] == flag if flag is not None else "not true, false, 1 or 0" in result[0]


@pytest.mark.parametrize("value", [NAN, None, "3", True, 1e39, 10**400, [1], float("inf")])
def test_number_that_float32_cannot_hold_is_no_number(value: Any) -> None:
    assert number_of(value) is None


def test_largest_number_is_finite_as_float32() -> None:
    assert np.isfinite(np.float32(number_of(3.4028235e38)))


def checked(folder: Path, values: Sequence[Any], columns: list[str], **options: Any) -> str:
    index: Index = open_index(write_set(folder, values), columns=columns)
    try:
        check_fields(index, {"x": "id"}, {"x": "objective.positives"}, **options)
    except GigabatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("columns", [[], ["x"]])
@pytest.mark.parametrize(
    ("values", "count", "first"),
    [
        ([1, None, 2, None, 3], 2, "s1"),
        ([1, 2, NAN], 1, "s2"),
        (["a", "b", "", " "], 2, "s2"),
        ([..., "b", "c"], 1, "s0"),
        ([[7], [], 3], 1, "s1"),
    ],
)
def test_check_counts_the_samples_without_an_id(
    columns: list[str], values: list[Any], count: int, first: str, tmp_path: Path
) -> None:
    message = checked(tmp_path, values, columns, remedy="set data.missing_ids=unique")
    assert message.startswith(f"objective.positives: {count} of {len(values)} samples of ")
    assert f"in the json field 'x'. The first is {tmp_path}/a.tar: sample {first!r}" in message
    assert ("The json fields are: x." in message) == (values[0] is not ...)
    assert message.endswith("or set data.missing_ids=unique.")
    assert ("gigabatch data index" in message) == (not columns)
    assert not checked(tmp_path, values, columns, allow_missing=True)


@pytest.mark.parametrize("columns", [[], ["x"]])
def test_check_refuses_a_field_that_no_sample_has(columns: list[str], tmp_path: Path) -> None:
    message = checked(tmp_path, [None, ..., ""], columns, allow_missing=True)
    assert message.startswith("objective.positives: 3 of 3 samples")
