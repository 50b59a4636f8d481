"""Fields of samples' json members as columns of the index, each of one type.

A column is of int64, float64, bool or text where all of its values are. Anything else, such as
numbers and texts in one column, nested values, or integers that neither int64 nor float64 holds,
is JSON text, of every value: so 1 and "1" stay apart, and equal values equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from gigabatch.data.errors import GigabatchError

MEMBER = (".offset", ".size", ".crc")
"""What the columns of a member end in."""
INT_LIMIT = 1 << 62
"""Integers from here on are JSON text."""
EXACT = 1 << 53
"""Up to here float64 holds every integer."""
_MARK = b"values"
_JSON, _WIDE = {_MARK: b"JSON text"}, {_MARK: b"integers above 2^53"}


def refuse_columns(names: Sequence[str]) -> None:
    """Raises GigabatchError for the names of columns that every index or mix has itself."""
    for name in names:
        if name in ("", "key", "source") or name.endswith(MEMBER):
            raise GigabatchError(
                f"--columns: {name!r} cannot be the name of a column: key, source and "
                f"{', '.join('*' + end for end in MEMBER)} say where a sample lies. Leave it out, "
                "or write the shards again with the field under another name."
            )


def column(name: str, values: Sequence[Any]) -> tuple[pa.Field, pa.Array]:
    """The column of one shard that holds `values`, as JSON has them."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.field(name, pa.null()), pa.nulls(len(values))
    most = max((abs(v) for v in values if type(v) is int), default=0)
    if kinds == {int} and most < INT_LIMIT:
        field = pa.field(name, pa.int64(), metadata=_WIDE if most > EXACT else None)
        return field, pa.array(values, field.type)
    if kinds <= {int, float} and most <= EXACT:
        return pa.field(name, pa.float64()), pa.array(values, pa.float64())
    if kinds == {bool}:
        return pa.field(name, pa.bool_()), pa.array(values, pa.bool_())
    if kinds == {str}:
        texts = [None if value is None else _unicode(value) for value in values]
        return pa.field(name, pa.string()), pa.array(texts, pa.string())
    return pa.field(name, pa.string(), metadata=_JSON), _as_json(values)


def wider(one: pa.Field | None, two: pa.Field) -> pa.Field:
    """The column that holds the values of two shards' columns of one name."""
    if one is None or pa.types.is_null(one.type):
        return two
    if pa.types.is_null(two.type):
        return one
    wide = [field for field in (one, two) if field.metadata == _WIDE]
    if is_json(one) or is_json(two) or one.type == two.type:
        return next((field for field in (one, two) if is_json(field)), wide[0] if wide else one)
    if {one.type, two.type} == {pa.int64(), pa.float64()} and not wide:
        return one if one.type == pa.float64() else two
    return pa.field(one.name, pa.string(), metadata=_JSON)


def cast(values: pa.ChunkedArray, own: pa.Field, to: pa.Field) -> pa.ChunkedArray:
    """A shard's column as `wider` made it of its own kind and others'."""
    if is_json(to) and not is_json(own):
        return pa.chunked_array([_as_json(values.to_pylist())])
    return values.cast(to.type)


def is_json(field: pa.Field) -> bool:
    """Whether the values of a column are JSON text."""
    return field.metadata is not None and field.metadata.get(_MARK) == _JSON[_MARK]


def json_text(value: Any) -> str:
    """JSON text by which equal values are equal: names sorted, 1.0 as 1."""
    return _unicode(json.dumps(_plain(value), sort_keys=True, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT:
        return int(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _as_json(values: Sequence[Any]) -> pa.Array:
    return pa.array([None if v is None else json_text(v) for v in values], pa.string())


def _unicode(text: str) -> str:
    """Half a surrogate pair, which only JSON's escapes can spell, becomes U+FFFD."""
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)
