"""Count the samples whose json fields hold no usable value, before a run or an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gigabatch.data.decode.ids import flag_of, is_missing, number_of
from gigabatch.data.decode.members import json_record
from gigabatch.data.errors import BadSample, GigabatchError, brief
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.shards.index import I64, Index
from gigabatch.data.shards.sources import Sources, rows_without_value

Use = Literal["id", "flag", "number"]
"""Meaning of a field: an id may have any value, a flag is true, false, 1 or 0."""
EXAMINED = 20_000
"""Maximum number of samples whose json is read; an indexed field is counted in full."""
REMOTE_EXAMINED = 1_000
"""The same for a remote set, whose samples are taken from its first shard."""
CHUNK = 1024
LISTED = 20
"""Maximum number of json fields that a message lists."""
_USABLE = {
    "id": lambda value: not is_missing(value),
    "flag": lambda value: flag_of(value) is not None,
    "number": lambda value: number_of(value) is not None,
}
_PROBLEMS = {
    "id": "no value (it is absent, null, NaN or empty)",
    "flag": "no flag (true, false, 1 or 0)",
    "number": "no number that float32 can hold",
}


@dataclass
class Unusable:
    """Samples whose field holds no usable value.

    Attributes:
        examined: Number of samples examined.
        rows: Rows of the unusable ones among them.
        first: Value of the first of these.
    """

    examined: int = 0
    rows: list[int] = field(default_factory=list)
    first: Any = None


def check_fields(
    index: Index,
    uses: Mapping[str, Use],
    keys: Mapping[str, str],
    *,
    remedy: str = "",
    allow_missing: bool = False,
    cache: ShardCache | None = None,
) -> None:
    """Check that fields of the samples' json hold usable values.

    Args:
        index: The set.
        uses: Field -> its meaning.
        keys: Field -> key that names it, for the message.
        remedy: What else fixes a missing id, for the message.
        allow_missing: Accept samples without a value; at least one must have it.
        cache: Cache of remote shards; None uses this node's cache.

    Raises:
        GigabatchError: for the first field that some samples lack; the message counts them.
    """
    for name, unusable in _examine(index, uses, cache).items():
        count, examined = len(unusable.rows), unusable.examined
        if count and (count == examined or not allow_missing):
            where = index.where(unusable.rows[0])
            part = "" if examined == len(index) else " examined"
            raise GigabatchError(
                f"{keys.get(name, 'objective')}: {count:,} of {examined:,} samples{part} of "
                f"{index.source} have {_PROBLEMS[uses[name]]} in the json field {name!r}. The "
                f"first is {where} (the value is {brief(unusable.first)})."
                f"{_list_fields(index, unusable.rows[0], cache)} Name a field that every sample has"
                f"{_remedies(index, name, remedy) if uses[name] == 'id' else ''}."
            )


def _list_fields(index: Index, row: int, cache: ShardCache | None) -> str:
    """Return a sentence with the json fields of a sample; empty if there are none."""
    with Sources([index], cache) as sources, suppress(BadSample):
        data = sources.read(np.array([row], np.int64), ["json"])[0].get("json")
        names = [*json_record(data, "")] if isinstance(data, bytes) else []
        more = ", ..." if len(names) > LISTED else ""
        return f" The json fields are: {', '.join(names[:LISTED])}{more}." if names else ""
    return ""


def _remedies(index: Index, name: str, remedy: str) -> str:
    """Return what else fixes samples without an id."""
    source = index.source
    command = "" if name in index.columns else f"`gigabatch data index {source} --columns {name}`, "
    view = f"{command}`gigabatch data filter {source} '{name} is not None' OUT`"
    return f", leave these samples out ({view}){', or ' if remedy else ''}{remedy}"


def _examine(
    index: Index, uses: Mapping[str, Use], cache: ShardCache | None
) -> dict[str, Unusable]:
    """Return the unusable samples of each field."""
    indexed = [name for name, use in uses.items() if use == "id" and name in index.columns]
    unusable = {}
    for name in indexed:
        rows = rows_without_value(index, name).tolist()
        first = index.values(name, np.array(rows[:1], np.int64))
        unusable[name] = Unusable(len(index), rows, *first)
    others = {name: use for name, use in uses.items() if name not in indexed}
    return unusable | (_examine_json(index, others, cache) if others else {})


def _examine_json(
    index: Index, uses: Mapping[str, Use], cache: ShardCache | None
) -> dict[str, Unusable]:
    index.require_members("json")
    unusable = {name: Unusable() for name in uses}
    with Sources([index], cache) as sources:
        rows = _rows_to_examine(index, sources.remote)
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            for row, raw in zip(chunk.tolist(), sources.read(chunk, ["json"]), strict=True):
                data = raw["json"]
                try:
                    record = json_record(data, "") if isinstance(data, bytes) else None
                except BadSample:
                    record = None
                if (
                    record is None
                ):  # a bad sample of another kind, which is replaced when it is read
                    continue
                for name, of_field in unusable.items():
                    of_field.examined += 1
                    if not _USABLE[uses[name]](record.get(name)):
                        if not of_field.rows:
                            of_field.first = record.get(name)
                        of_field.rows.append(row)
    return unusable


def _rows_to_examine(index: Index, is_remote: bool) -> I64:
    """Return evenly spaced rows; of a remote set, the first rows of its first shard."""
    if is_remote:
        return np.arange(min(int(index.shard_sizes[index.shard_sizes > 0][0]), REMOTE_EXAMINED))
    step = -(-len(index) // EXAMINED)
    return np.arange(0, len(index), step)
