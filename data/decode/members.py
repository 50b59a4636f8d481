"""Decode array and json members. Nothing here unpickles or starts a program."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigabatch.data.decode.ids import code_of, is_missing, number_of
from gigabatch.data.errors import BadSample, brief, describe_error

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
        return _parse_array(data)
    except Exception as error:  # numpy parses the header as Python, which raises many types
        raise BadSample(
            f"{where}: the .npy member cannot be read: {describe_error(error)}."
        ) from error


def _parse_array(data: bytes) -> Array:
    """Return a copy of the array in the contents of a .npy file; never more than the file holds."""
    if data.startswith(b"PK\x03\x04"):
        raise ValueError("it is a zip archive, as numpy.savez writes; numpy.save writes .npy files")
    file = io.BytesIO(data)
    is_first_version = np.lib.format.read_magic(file) == (1, 0)
    read_header = (
        np.lib.format.read_array_header_1_0
        if is_first_version
        else np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    # Compare before any allocation: a header may claim terabytes.
    count, start = math.prod(shape), file.tell()
    if min(shape, default=0) < 0 or count * dtype.itemsize > len(data) - start:
        raise ValueError(
            f"its header claims {count:,} values of {dtype.itemsize} bytes, the file has "
            f"{len(data) - start:,} bytes of values"
        )
    if not count:
        return np.empty(shape, dtype.newbyteorder("="))
    values = np.frombuffer(data, dtype, count, start)
    array = values.reshape(shape[::-1]).T if is_fortran else values.reshape(shape)
    return array.astype(dtype.newbyteorder("="), order="C")


def json_record(data: bytes, where: str) -> dict[str, Any]:
    """Return the mapping in a json member; {} if it is a different kind of value.

    Raises:
        BadSample: if the json cannot be read.
    """
    try:
        record: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{where}: the json member cannot be read: {error}.") from error
    return record if isinstance(record, dict) else {}


def decode_column(data: bytes, column: str, where: str) -> int:
    """Return the code of a field of a json member; see `ids.code_of`.

    Args:
        data: Contents of the json member.
        column: Name of the field.
        where: Name of the sample, for error messages.

    Raises:
        BadSample: if the json cannot be read, or the field is missing or holds no value.
    """
    value = json_record(data, where).get(column)
    if is_missing(value):
        raise missing_id(column, value, where)
    return code_of(value)


def missing_id(column: str, value: Any, where: str, key: str = "objective.positives") -> BadSample:
    """Return the error of a sample without an id.

    Args:
        column: Name of the field.
        value: Its value.
        where: Name of the sample.
        key: Key of the config that names the field.
    """
    return BadSample(
        f"{where}: its json member has no {column!r} (the value is {brief(value)}). Set {key} "
        "(`gigabatch eval`: positives=FIELD or none) to a field that every sample has, or "
        "data.missing_ids=unique."
    )


def decode_number(data: bytes, column: str, where: str) -> float:
    """Return a number from a json member; float32 represents it as finite.

    Args:
        data: Contents of the json member.
        column: Name of the field.
        where: Name of the sample, for error messages.

    Raises:
        BadSample: if the json cannot be read or the field is not such a number.
    """
    return number_or_error(json_record(data, where).get(column), column, where)


def number_or_error(value: Any, column: str, where: str) -> float:
    """Return the number that a json value is; raise BadSample if it is none."""
    number = number_of(value)
    if number is None:
        raise BadSample(
            f"{where}: {column!r} of its json member is not a number that float32 can hold: "
            f"{brief(value)}."
        )
    return number
