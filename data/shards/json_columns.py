"""Build index columns from fields of samples' json members; each column has one type.

A column is int64, float64, bool or text if all of its values are. Otherwise it contains the JSON
text of every value. This applies to numbers and texts in one column, nested values, and integers
that neither int64 nor float64 can represent. Thus 1 and "1" stay different, and equal values stay
equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from gigabatch.data.errors import GigabatchError

MEMBER_SUFFIXES = (".offset", ".size", ".crc")
"""Endings of the columns of a member, such as `png.offset`."""
INT_LIMIT = 1 << 62
"""Integers of at least this magnitude become JSON text."""
FLOAT_EXACT = 1 << 53
"""float64 represents every integer up to this exactly."""
_MARK = b"values"
_JSON, _LARGE_INTS = {_MARK: b"JSON text"}, {_MARK: b"integers above 2^53"}


def check_column_names(names: Sequence[str]) -> None:
    """Check that no name is reserved for a column that every index or mixture has.

    Raises:
        GigabatchError: if a name is reserved; the message names the first.
    """
    for name in names:
        if name in ("", "key", "source") or name.endswith(MEMBER_SUFFIXES):
            raise GigabatchError(
                f"--columns: {name!r} cannot be the name of a column: key, source and "
                f"{', '.join('*' + suffix for suffix in MEMBER_SUFFIXES)} locate a sample. Omit "
                "it, or rewrite the shards with the field under a different name."
            )


def build_column(name: str, values: Sequence[Any]) -> tuple[pa.Field, pa.Array]:
    """Return the field and values of a column of one shard.

    Args:
        name: The column's name.
        values: Parsed JSON values, one per sample.

    Raises:
        GigabatchError: if a value is nested too deeply; the message lacks the shard.
    """
    types = {type(value) for value in values if value is not None}
    if not types:
        return pa.field(name, pa.null()), pa.nulls(len(values))
    largest = max((abs(v) for v in values if type(v) is int), default=0)
    if types == {int} and largest < INT_LIMIT:
        metadata = _LARGE_INTS if largest > FLOAT_EXACT else None
        field = pa.field(name, pa.int64(), metadata=metadata)
        return field, pa.array(values, field.type)
    if types <= {int, float} and largest <= FLOAT_EXACT:
        return pa.field(name, pa.float64()), pa.array(values, pa.float64())
    if types == {bool}:
        return pa.field(name, pa.bool_()), pa.array(values, pa.bool_())
    if types == {str}:
        texts = [None if value is None else _replace_surrogates(value) for value in values]
        return pa.field(name, pa.string()), pa.array(texts, pa.string())
    try:
        return pa.field(name, pa.string(), metadata=_JSON), _json_array(values)
    except RecursionError:
        raise GigabatchError(
            f"a value of the json field {name!r} is nested too deeply. Index without the column "
            f"{name!r}, or rewrite the shard."
        ) from None


def merge_fields(one: pa.Field | None, two: pa.Field) -> pa.Field:
    """Return the field that can hold the values of two shards' columns of one name."""
    if one is None or pa.types.is_null(one.type):
        return two
    if pa.types.is_null(two.type):
        return one
    large = [field for field in (one, two) if field.metadata == _LARGE_INTS]
    if holds_json(one) or holds_json(two) or one.type == two.type:
        json_fields = [field for field in (one, two) if holds_json(field)]
        return (*json_fields, *large, one)[0]
    if {one.type, two.type} == {pa.int64(), pa.float64()} and not large:
        return one if one.type == pa.float64() else two
    return pa.field(one.name, pa.string(), metadata=_JSON)


def cast_column(values: pa.ChunkedArray, old: pa.Field, new: pa.Field) -> pa.ChunkedArray:
    """Convert a shard's column from its field `old` to `new`, a result of `merge_fields`."""
    if holds_json(new) and not holds_json(old):
        return pa.chunked_array([_json_array(values.to_pylist())])
    return values.cast(new.type)


def holds_json(field: pa.Field) -> bool:
    """Return whether the values of a column are JSON text."""
    return field.metadata is not None and field.metadata.get(_MARK) == _JSON[_MARK]


def canonical_json(value: Any) -> str:
    """Return JSON text that is equal for equal values: names sorted, 1.0 as 1."""
    return json.dumps(canonical_value(value), sort_keys=True, ensure_ascii=False)


def canonical_value(value: Any) -> Any:
    """Return a json value in the form that an index stores: 1.0 as 1, no half surrogate pairs.

    Raises:
        RecursionError: if the value is nested too deeply.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) <= FLOAT_EXACT:
        return int(value)
    if isinstance(value, str):
        return _replace_surrogates(value)
    if isinstance(value, dict):
        return {_replace_surrogates(name): canonical_value(item) for name, item in value.items()}
    return list(map(canonical_value, value)) if isinstance(value, list) else value


def _json_array(values: Sequence[Any]) -> pa.Array:
    return pa.array([None if v is None else canonical_json(v) for v in values], pa.string())


def _replace_surrogates(text: str) -> str:
    """Replace single halves of surrogate pairs, which UTF-8 cannot encode, by U+FFFD."""
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)
