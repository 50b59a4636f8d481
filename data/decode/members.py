"""Decode array and json members. Nothing here unpickles or starts a program."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigabatch.data.errors import BadSample
from gigabatch.data.rng import key

Array = np.ndarray[Any, Any]


def decode_array(data: bytes, where: str) -> Tensor:
    """Decode a .npy member of numbers or booleans, without unpickling.

    Args:
        data: Contents of the member.
        where: Name of the sample, for error messages.

    Returns:
        The array as a tensor of the same shape and dtype.

    Raises:
        BadSample: if the member cannot be read.
    """
    try:
        return torch.from_numpy(load_array(data, where))
    except TypeError as error:
        raise BadSample(f"{where}: the .npy member cannot be read: {error}.") from error


def load_array(data: bytes, where: str) -> Array:
    """Return the array of a .npy member in this machine's byte order.

    Raises:
        BadSample: if the member cannot be read.
    """
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, MemoryError) as error:
        raise BadSample(f"{where}: the .npy member cannot be read: {error}.") from error


def _json_field(data: bytes, name: str, where: str) -> Any:
    """Return a field of a json member; None if it is missing."""
    try:
        record: Any = json.loads(data)
    except ValueError as error:
        raise BadSample(f"{where}: the json member cannot be read: {error}.") from error
    return record.get(name) if isinstance(record, dict) else None


def decode_column(data: bytes, column: str, where: str) -> int:
    """Return the integer code of a field of a json member; see `code_of`.

    Args:
        data: Contents of the json member.
        column: Name of the field.
        where: Name of the sample, for error messages.

    Raises:
        BadSample: if the json cannot be read or lacks the field.
    """
    value = _json_field(data, column, where)
    if value is None:  # unknown values are not equal to each other
        raise BadSample(
            f"{where}: its json member has no {column!r}. Set objective.positives "
            "(`gigabatch eval`: --positives FIELD, or none) to a field that every sample has."
        )
    return code_of(value)


def decode_number(data: bytes, column: str, where: str) -> float:
    """Return a finite number from a json member.

    Args:
        data: Contents of the json member.
        column: Name of the field.
        where: Name of the sample, for error messages.

    Raises:
        BadSample: if the json cannot be read or the field is not a finite number.
    """
    value = _json_field(data, column, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadSample(f"{where}: {column!r} of its json member is not a number: {value!r}.")
    return float(value)


def code_of(value: Any) -> int:
    """Return an integer up to 62 bits unchanged, and a 63-bit hash of any other json value."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62:
        return value
    return key("column", json.dumps(value, sort_keys=True)) >> 1
