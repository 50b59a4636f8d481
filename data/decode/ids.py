"""Ids: int64 codes of json values, equal for equal values. A missing value has no code.

A value is missing if it is null, a number that is not finite (NaN, Infinity), a text of only white
space, or a list or mapping with nothing else in it.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from gigabatch.data.rng import key
from gigabatch.data.shards.json_columns import canonical_value

FieldsVersion = Literal[1, 2]
"""Version of the meaning of fields; see `data.fields_version`."""
MissingIds = Literal["error", "unique"]
"""Treatment of samples without an id; see `data.missing_ids`."""
INT_LIMIT = 1 << 62
"""Integers of a smaller magnitude are their own codes."""
FLOAT32_LIMIT = (1 << 128) - (1 << 103)
"""Magnitude from which float32 rounds a number to infinity."""
OLD_UNKNOWN_CODE = -1
"""Code of a null in an indexed column in version 1, which is also the code of the integer -1."""


def is_missing(value: Any) -> bool:
    """Return whether a json value holds nothing that could identify a sample."""
    values = [value]
    while values:  # no recursion: json may be nested as deeply as Python's stack
        item = values.pop()
        if isinstance(item, list | dict):
            values += item.values() if isinstance(item, dict) else item
        elif isinstance(item, float):
            if math.isfinite(item):
                return False
        elif item is not None and (not isinstance(item, str) or item.strip()):
            return False
    return True


def code_of(value: Any) -> int:
    """Return the code of a json value.

    An integer of up to 62 bits is its own code; any other value has a 63-bit hash. 7 and 7.0 have
    one code, also inside lists and mappings; true, 1 and "1" have different codes.
    """
    return _hash_or_integer(canonical_value(value))


def unknown_code(number: int) -> int:
    """Return the code of sample `number` if it lacks an id: no value and no other sample has it."""
    return -INT_LIMIT - 1 - number


def old_code_of(value: Any) -> int:
    """Return the code of a json value in version 1, in which 7 and 7.0 are different."""
    return _hash_or_integer(value)


def flag_of(value: Any) -> int | None:
    """Return 1 for true and 1, 0 for false and 0, and None for any other value."""
    return int(value) if isinstance(value, int | float) and value in (0, 1) else None


def number_of(value: Any) -> float | None:
    """Return a number that float32 represents as finite; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < FLOAT32_LIMIT else None


def _hash_or_integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < INT_LIMIT:
        return value
    return key("column", json.dumps(value, sort_keys=True)) >> 1
