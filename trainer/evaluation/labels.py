"""Values of the samples' json: labels, classes with their names, slices."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigabatch.data.decode.members import code_of
from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.reader import DamagedMember
from gigabatch.data.shards.sources import Sources
from gigabatch.data.text.captions import value_at

CHUNK = 4096


def field_values(
    index: Index, field: str, cache: ShardCache | None = None, required: bool = True
) -> list[Any]:
    """The value of a field, or a path such as `names.en`, of every sample; without `required`,
    None where a sample has none. Raises GigabatchError, which names the first sample without one.
    """
    if "json" not in index.members:
        raise GigabatchError(
            f"{index.source}: its samples have no json member, so no field {field!r}."
        )
    values: list[Any] = []
    with Sources([index], cache) as sources:
        for first in range(0, len(index), CHUNK):
            rows = np.arange(first, min(first + CHUNK, len(index)))
            for number, raw in zip(rows.tolist(), sources.read(rows, ["json"]), strict=True):
                values.append(_value(raw.get("json"), field, index, number, required))
    return values


def _value(
    data: bytes | DamagedMember | None, field: str, index: Index, number: int, must: bool
) -> Any:
    record: Any = None
    try:
        if isinstance(data, bytes):
            record = json.loads(data)
        found = value_at(record, field)
    except ValueError as error:
        raise GigabatchError(f"{index.where(number)}: its json cannot be read: {error}.") from None
    if found is None and must:
        known = ", ".join(sorted(record)) if isinstance(record, dict) else "nothing"
        raise GigabatchError(
            f"{index.where(number)}: its json member has no {field!r}; it has {known}. Name a "
            "field that every sample has."
        )
    return found


def codes_of(values: Sequence[Any]) -> Tensor:
    """int64 [N]: equal values have equal codes, in this set and in any other."""
    return torch.tensor([code_of(value) for value in values], dtype=torch.int64)


def numbers_of(values: Sequence[Any], field: str, index: Index) -> Tensor:
    """float64 [N]. Raises GigabatchError, which names the first sample whose value is no number."""
    for number, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise GigabatchError(
                f"{index.where(number)}: {field!r} of its json member is no number: {value!r}. "
                "Name a field of numbers."
            )
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def flags_of(values: Sequence[Any], field: str, index: Index) -> Tensor:
    """bool [N], of true and false or 1 and 0. Raises GigabatchError, which names the first sample
    whose value is neither."""
    for number, value in enumerate(values):
        if not isinstance(value, int | float) or value not in (0, 1):
            raise GigabatchError(
                f"{index.where(number)}: {field!r} of its json member is neither true nor false, "
                f"nor 1 or 0: {value!r}. Name a field that says yes or no."
            )
    return torch.tensor([bool(value) for value in values])


def named_classes(
    values: Sequence[Any], names: Path | None, field: str
) -> tuple[list[str], Tensor]:
    """(the classes' names, the class int64 [N] of each sample).

    Without `names` each distinct value is a class and its own name. A .json file maps values to
    names; of any other text file, line n (from 0) names the value n. Raises GigabatchError.
    """
    if names is None:
        known = sorted({str(value) for value in values})
        table = {name: name for name in known}
    else:
        table = _table(names)
    rows = {value: row for row, value in enumerate(table)}
    lost = next((value for value in values if str(value) not in rows), None)
    if lost is not None:
        raise GigabatchError(f"{names}: names no class for {field} = {lost!r}.")
    classes = torch.tensor([rows[str(value)] for value in values], dtype=torch.int64)
    return list(table.values()), classes


def _table(path: Path) -> dict[str, str]:
    """value, as text -> name of the class."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except OSError as error:
        raise GigabatchError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise GigabatchError(f"{path}: cannot be read: {error}.") from None
    if isinstance(found, list):
        found = {str(number): name for number, name in enumerate(found)}
    if not isinstance(found, dict) or not found:
        raise GigabatchError(f"{path}: holds no classes; map values to names, or list the names.")
    for value, name in found.items():
        if not isinstance(name, str) or not name.strip():
            raise GigabatchError(f"{path}: the class {value} has the name {name!r}, not a text.")
    return {str(value): name.strip() for value, name in found.items()}
