"""Values of the samples' JSON fields: class codes, numbers, flags, class names."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigabatch.data.decode.ids import code_of, is_missing
from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.json_columns import canonical_value
from gigabatch.data.shards.reader import DamagedMember
from gigabatch.data.shards.sources import Sources
from gigabatch.data.text.captions import value_at

CHUNK = 4096
"""Number of samples to read at a time."""


def field_values(
    index: Index, field: str, cache: ShardCache | None = None, required: bool = True
) -> list[Any]:
    """Read a JSON field of every sample.

    Args:
        index: The set.
        field: A field, or a path such as `names.en`.
        cache: Local copies of remote shards.
        required: Raise if samples lack the field.

    Returns:
        The value of every sample; None where it is missing (see `ids.is_missing`).

    Raises:
        GigabatchError: if samples have no JSON, or if `required` and samples lack the field; the
            message counts them and names the first.
    """
    if "json" not in index.members:
        raise GigabatchError(
            f"{index.source}: its samples have no json member, so they have no field {field!r}."
        )
    values: list[Any] = []
    missing: list[tuple[int, str]] = []
    with Sources([index], cache) as sources:
        for first in range(0, len(index), CHUNK):
            rows = np.arange(first, min(first + CHUNK, len(index)))
            for sample, members in zip(rows.tolist(), sources.read(rows, ["json"]), strict=True):
                record = _record(members.get("json"), index, sample)
                value = _value(record, field, index, sample)
                if is_missing(value):
                    value = None
                    names = ", ".join(sorted(record)) if isinstance(record, dict) else "none"
                    missing.append((sample, names))
                values.append(value)
    if missing and required:
        sample, names = missing[0]
        raise GigabatchError(
            f"{index.source}: {len(missing):,} of {len(index):,} samples have no field {field!r} "
            f"in their json, or nothing in it (null, NaN, an empty text). The first is "
            f"{index.where(sample)}; its fields: {names}. Name a field that every sample has."
        )
    return values


def _record(data: bytes | DamagedMember | None, index: Index, sample: int) -> Any:
    """Return the JSON of one sample; None if it has none."""
    try:
        return json.loads(data) if isinstance(data, bytes) else None
    except (ValueError, RecursionError) as error:
        raise GigabatchError(f"{index.where(sample)}: its json cannot be read: {error}.") from None


def _value(record: Any, field: str, index: Index, sample: int) -> Any:
    """Return the field of one sample's JSON."""
    try:
        value = value_at(record, field)
        canonical_value(value)  # fails here, with the sample's name, if it is nested too deeply
        return value
    except (ValueError, RecursionError) as error:
        raise GigabatchError(f"{index.where(sample)}: its json cannot be read: {error}.") from None


def codes_of(values: Sequence[Any]) -> Tensor:
    """Return codes int64 [N]; equal values have equal codes, also in different sets."""
    return torch.tensor([code_of(value) for value in values], dtype=torch.int64)


def numbers_of(values: Sequence[Any], field: str, index: Index) -> Tensor:
    """Return the values as float64 [N].

    Raises:
        GigabatchError: if a value is not a finite number; the message names the first such sample.
    """
    for sample, value in enumerate(values):
        # bool is a subclass of int, so it is excluded first.
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise GigabatchError(
                f"{index.where(sample)}: json field {field!r} is {value!r}, not a finite number. "
                "Name a field of numbers."
            )
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for float64
        return False


def flags_of(values: Sequence[Any], field: str, index: Index) -> Tensor:
    """Convert true and false, or 1 and 0, to bool [N].

    Raises:
        GigabatchError: if a value is not one of these; the message names the first such sample.
    """
    for sample, value in enumerate(values):
        if not isinstance(value, int | float) or value not in (0, 1):
            raise GigabatchError(
                f"{index.where(sample)}: json field {field!r} is {value!r}, not true, false, 1 or "
                "0. Name a field of flags."
            )
    return torch.tensor([bool(value) for value in values])


def named_classes(
    values: Sequence[Any], names: Path | None, field: str
) -> tuple[list[str], Tensor]:
    """Map the values of a field to classes with names.

    Args:
        values: Value of each sample.
        names: A .json file that maps values to names, or a text file whose line n, counted from 0,
            names the value n. None makes each distinct value a class, named by the value.
        field: Name of the field, for messages.

    Returns:
        (names of the classes, the class of each sample int64 [N]).

    Raises:
        GigabatchError: if the file is invalid, or lacks the name of a value.
    """
    if names is None:
        known = sorted({_text_of(value) for value in values})
        class_names = {name: name for name in known}
    else:
        class_names = _read_class_names(names)
    rows = {value: row for row, value in enumerate(class_names)}
    unnamed = next((value for value in values if _text_of(value) not in rows), None)
    if unnamed is not None:
        raise GigabatchError(f"{names}: no class name for {field} = {unnamed!r}. Add it.")
    classes = torch.tensor([rows[_text_of(value)] for value in values], dtype=torch.int64)
    return list(class_names.values()), classes


def _text_of(value: Any) -> str:
    """Return the name of a value in a file of class names; 7 and 7.0 are one value."""
    return str(canonical_value(value))


def _read_class_names(path: Path) -> dict[str, str]:
    """Return value, as text -> name of the class."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except OSError as error:
        raise GigabatchError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise GigabatchError(f"{path}: cannot be read: {error}.") from None
    if isinstance(content, list):
        content = {str(row): name for row, name in enumerate(content)}
    if not isinstance(content, dict) or not content:
        raise GigabatchError(f"{path}: no classes. Map values to names, or list the names.")
    for value, name in content.items():
        if not isinstance(name, str) or not name.strip():
            raise GigabatchError(f"{path}: the name of class {value} is {name!r}, not a text.")
    return {str(value): name.strip() for value, name in content.items()}
