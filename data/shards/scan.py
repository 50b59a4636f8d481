"""Scan one shard into index rows: group members into samples, report errors with byte offsets.

A sample's members are adjacent and share a key, which by webdataset's rule is the name up to its
first dot. webdataset silently merges, splits or drops some shards that break this rule; here they
are errors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gigabatch.data.errors import GigabatchError
from gigabatch.data.settings import Settings
from gigabatch.data.shards.json_columns import build_column, check_column_names
from gigabatch.data.shards.tar_members import Members, read_members

PICKLE_EXTENSIONS = ("pkl", "pickle", "pyd", "pth", "pt")  # webdataset would unpickle these


class IndexSettings(Settings):
    """Content of an index; stored in the index, and kept when shards are added."""

    checksums: bool = True
    """Store the CRC-32C of every member and verify it at each read; false reads only headers."""
    columns: tuple[str, ...] = ()
    """Fields of the json member to store in the index, for filters, groups and positives."""
    dotted: bool = False
    """Accept extensions with dots (`left.jpg`), even if samples differ in them."""


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard.

    Attributes:
        table: Columns `key`, `EXT.offset`, `EXT.size` and `EXT.crc` of every extension, and the
            json fields.
        digest: SHA-256 of names, sizes and checksums.
        unused: Number of members without an extension, which belong to no sample.
    """

    table: pa.Table
    digest: str
    unused: int = 0


@dataclass
class _Grouping:
    """The members of a shard grouped into samples.

    Attributes:
        keys: Key of every sample.
        first_members: Number of every sample's first member.
        extensions: The extensions that occur.
        members: Numbers of the members that belong to a sample.
        rows: Sample of each of these members.
        kinds: Extension of each of these members, as a position in `extensions`.
        unused: Number of members without an extension; hidden files are not counted.
    """

    keys: list[str] = field(default_factory=list)
    first_members: list[int] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    unused: int = 0


def scan_shard(file: int, where: str, settings: IndexSettings) -> ShardRows:
    """Return the index rows of a shard.

    Args:
        file: Descriptor of the open tar file.
        where: Path or URL of the shard, for errors.
        settings: Content of the rows.

    Raises:
        GigabatchError: if the shard is damaged or ambiguous; the message names the byte offset.
    """
    check_column_names(settings.columns)
    members = read_members(file, where, settings.checksums)
    samples = _group_members(members, where)
    _reject_repeats(samples, members, where)
    if not settings.dotted:
        _reject_ambiguous_extensions(samples, members, where)
    columns = _member_columns(samples, members)
    json_columns = _json_columns(file, columns, settings.columns, where)
    member_fields = [pa.field(name, array.type) for name, array in columns.items()]
    schema = pa.schema([*member_fields, *(field for field, _ in json_columns)])
    arrays = [*columns.values(), *(array for _, array in json_columns)]
    return ShardRows(
        pa.table(arrays, schema=schema), _digest(members, samples.members), samples.unused
    )


def _group_members(members: Members, where: str) -> _Grouping:
    """Group members into samples by their keys."""
    out = _Grouping()
    kind_of: dict[str, int] = {}  # extension as written -> position in `extensions`
    last_key, row = None, -1
    for number, name in enumerate(members.names):
        if not name:
            raise _error(where, members, number, "a member has no name")
        start = name.rfind("/") + 1
        dot = name.find(".", start)
        if name[0] == "/" or (".." in name and ".." in name.split("/")):
            raise _error(where, members, number, f"the name {name!r} leads out of the shard")
        if dot <= start:
            out.unused += dot < 0
            continue  # webdataset skips names without an extension, and hidden files
        key, extension = name[:dot], name[dot + 1 :]
        if key != last_key:
            last_key, row = key, row + 1
            out.keys.append(key)
            out.first_members.append(number)
        kind = kind_of.get(extension)
        if kind is None:
            kind = kind_of[extension] = _kind(extension, out.extensions, members, number, where)
        out.members.append(number)
        out.rows.append(row)
        out.kinds.append(kind)
    return out


def _kind(extension: str, extensions: list[str], members: Members, number: int, where: str) -> int:
    """Return the position of an extension in `extensions`, appending it if it is new."""
    lower = extension.lower()  # webdataset ignores case too
    if lower.rpartition(".")[2] in PICKLE_EXTENSIONS:
        raise _error(
            where, members, number,
            f"member {members.names[number]!r} is a pickle, which can run any code when it is "
            "opened; it was not opened. Rewrite the shard without it",
        )  # fmt: skip
    if lower not in extensions:
        extensions.append(lower)
    return extensions.index(lower)


def _member_columns(samples: _Grouping, members: Members) -> dict[str, pa.Array]:
    """Return the columns `key`, `EXT.offset`, `EXT.size` and `EXT.crc`, 0 for missing members."""
    columns: dict[str, pa.Array] = {"key": pa.array(samples.keys, pa.large_string())}
    numbers = np.array(samples.members, np.int64)
    rows, kinds = np.array(samples.rows, np.int64), np.array(samples.kinds, np.int64)
    values: dict[str, NDArray[Any]] = {
        "offset": np.array(members.offsets, np.int64)[numbers],
        "size": np.array(members.sizes, np.int64)[numbers],
    }
    if members.checksums:
        values["crc"] = np.array(members.checksums, np.uint32)[numbers]
    for kind in np.argsort(samples.extensions):
        of_kind = kinds == kind
        for suffix, member_values in values.items():
            column = np.zeros(len(samples.keys), member_values.dtype)
            column[rows[of_kind]] = member_values[of_kind]
            columns[f"{samples.extensions[kind]}.{suffix}"] = pa.array(column)
    return columns


def _reject_repeats(samples: _Grouping, members: Members, where: str) -> None:
    """Raise GigabatchError for a key that returns after other keys, or a repeated extension."""
    cells = np.array(samples.rows, np.int64) * len(samples.extensions) + samples.kinds
    repeat: int | None = None
    if len(np.unique(cells)) < len(cells):
        seen_cells: set[int] = set()
        for member, cell in zip(samples.members, cells.tolist(), strict=True):
            if cell in seen_cells:
                repeat = member
                break
            seen_cells.add(cell)
    if len(set(samples.keys)) < len(samples.keys):
        seen_keys: set[str] = set()
        for first, key in zip(samples.first_members, samples.keys, strict=True):
            if key in seen_keys:
                repeat = first if repeat is None else min(first, repeat)
                break
            seen_keys.add(key)
    if repeat is not None:
        key = samples.keys[samples.rows[samples.members.index(repeat)]]
        raise _error(
            where, members, repeat,
            f"key {key!r} occurs a second time (member {members.names[repeat]!r}). Members of a "
            "sample must be adjacent and unique; a dot inside the key is a common cause. Rewrite "
            "the shard",
        )  # fmt: skip


def _reject_ambiguous_extensions(samples: _Grouping, members: Members, where: str) -> None:
    """Raise GigabatchError for extensions with dots that may be part of a key."""
    # webdataset reads `img.v1.jpg` and `img.v2.jpg` as one sample `img`, `www.site.jpg` as `www`.
    if not any("." in name for name in samples.extensions):
        return
    counts = Counter(samples.kinds)
    last_parts = Counter(
        (row, samples.extensions[kind].rpartition(".")[2])
        for row, kind in zip(samples.rows, samples.kinds, strict=True)
    )
    for member, row, kind in zip(samples.members, samples.rows, samples.kinds, strict=True):
        name = samples.extensions[kind]
        if "." not in name:
            continue
        not_in_all = counts[kind] < len(samples.keys)
        if not_in_all or last_parts[row, name.rpartition(".")[2]] > 1:
            raise _error(
                where, members, member,
                f"member {members.names[member]!r} reads as sample {samples.keys[row]!r} with "
                f"extension {name!r}, since a key ends at its first dot. If that is intended, "
                "index with --dotted; else rewrite the shard with keys that have no dot",
            )  # fmt: skip


def _error(where: str, members: Members, number: int, what: str) -> GigabatchError:
    return GigabatchError(f"{where}: at byte {members.offsets[number]}: {what}.")


def _digest(members: Members, numbers: Sequence[int]) -> str:
    """Return the SHA-256 of the names, sizes and checksums of some members."""
    digest = hashlib.sha256()
    digest.update("\n".join([members.names[i] for i in numbers]).encode())
    index = np.array(numbers, np.int64)
    digest.update(np.array(members.sizes, "<i8")[index].tobytes())
    if members.checksums:
        digest.update(np.array(members.checksums, "<u4")[index].tobytes())
    return digest.hexdigest()


def _json_columns(
    file: int, columns: dict[str, pa.Array], names: Sequence[str], where: str
) -> list[tuple[pa.Field, pa.Array]]:
    """Return fields of the json members as columns, null where a sample lacks the field."""
    if not names:
        return []
    if "json.offset" not in columns:
        return [build_column(name, [None] * len(columns["key"])) for name in names]
    values: dict[str, list[Any]] = {name: [] for name in names}
    spans = zip(columns["json.offset"].tolist(), columns["json.size"].tolist(), strict=True)
    for row, (offset, size) in enumerate(spans):
        record = {}
        if offset:
            record = _parse_json(os.pread(file, size, offset), where, offset, columns, row)
        for name in names:
            values[name].append(record.get(name))
    try:
        return [build_column(name, of_name) for name, of_name in values.items()]
    except GigabatchError as error:
        raise GigabatchError(f"{where}: {error}") from None


def _parse_json(
    data: bytes, where: str, offset: int, columns: dict[str, pa.Array], row: int
) -> dict[str, Any]:
    """Return the object in a json member; {} if it is a different kind of value."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        key = columns["key"][row].as_py()
        raise GigabatchError(
            f"{where}: at byte {offset}: the json member of sample {key!r} cannot be read: "
            f"{error}. Rewrite the shard, or index without --columns."
        ) from None
    return record if isinstance(record, dict) else {}
