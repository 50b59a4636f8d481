"""One shard to its rows: members grouped into samples, with what is wrong named by offset.

A sample's members are adjacent and share a key: webdataset's rule, the name up to its first dot.
What that rule would merge, split or drop in silence is an error here.
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
from gigabatch.data.shards.json_columns import column, refuse_columns
from gigabatch.data.shards.tar_members import Members, walk

PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")  # what webdataset would unpickle


class IndexSettings(Settings):
    """What an index holds; written into it, and kept when shards are added."""

    checksums: bool = True
    """CRC-32C of every member, verified at each read. Off: headers alone are read."""
    columns: tuple[str, ...] = ()
    """Fields of the json member to bring into the index, for filters, groups and positives."""
    dotted: bool = False
    """Take extensions with dots (`left.jpg`) as they are, even where samples differ in them."""


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard. `table`: `key`, `EXT.offset|size|crc` a member, and the columns.
    `digest`: SHA-256 over names, sizes and checksums."""

    table: pa.Table
    digest: str


@dataclass
class _Samples:
    """Members by sample: `rows`, `kinds` give each member's sample and its place in `names`."""

    keys: list[str] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)  # each sample's first member
    names: list[str] = field(default_factory=list)  # the extensions
    members: list[int] = field(default_factory=list)  # those that belong to samples
    rows: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)


def scan(file: int, where: str, settings: IndexSettings) -> ShardRows:
    """The rows of the tar open as `file`. Raises GigabatchError for anything that is wrong."""
    refuse_columns(settings.columns)
    members = walk(file, where, settings.checksums)
    samples = _group(members, where)
    _refuse_repeats(samples, members, where)
    if not settings.dotted:
        _refuse_ambiguous(samples, members, where)
    columns: dict[str, pa.Array] = {"key": pa.array(samples.keys, pa.large_string())}
    places = np.array(samples.members, np.int64)
    rows, kinds = np.array(samples.rows, np.int64), np.array(samples.kinds, np.int64)
    values: dict[str, NDArray[Any]] = {
        "offset": np.array(members.offsets, np.int64)[places],
        "size": np.array(members.sizes, np.int64)[places],
    }
    if settings.checksums:
        values["crc"] = np.array(members.checksums, np.uint32)[places]
    for kind in np.argsort(samples.names):
        of_kind = kinds == kind
        for what, numbers in values.items():
            spread = np.zeros(len(samples.keys), numbers.dtype)
            spread[rows[of_kind]] = numbers[of_kind]
            columns[f"{samples.names[kind]}.{what}"] = pa.array(spread)
    lifted = _lift(file, columns, settings.columns, where)
    plain = [pa.field(name, array.type) for name, array in columns.items()]
    schema = pa.schema([*plain, *(field for field, _ in lifted)])
    table = pa.table([*columns.values(), *(array for _, array in lifted)], schema=schema)
    return ShardRows(table, _digest(members, samples.members))


def _group(members: Members, where: str) -> _Samples:
    out = _Samples()
    number: dict[str, int] = {}  # of each extension as it is written
    last, row = None, -1
    for index, name in enumerate(members.names):
        if not name:
            raise _wrong(where, members, index, "a member has no name")
        start = name.rfind("/") + 1
        dot = name.find(".", start)
        if name[0] == "/" or (".." in name and ".." in name.split("/")):
            raise _wrong(where, members, index, f"the name {name!r} leads out of the shard")
        if dot <= start:
            continue  # webdataset skips names without an extension, and hidden files
        key, extension = name[:dot], name[dot + 1 :]
        if key != last:
            last, row = key, row + 1
            out.keys.append(key)
            out.firsts.append(index)
        kind = number.get(extension)
        if kind is None:
            kind = number[extension] = _kind(extension, out.names, members, index, where)
        out.members.append(index)
        out.rows.append(row)
        out.kinds.append(kind)
    return out


def _kind(extension: str, names: list[str], members: Members, index: int, where: str) -> int:
    """The number of an extension; upper case is taken for lower, as webdataset does."""
    lower = extension.lower()
    if lower.rpartition(".")[2] in PICKLES:
        raise _wrong(
            where, members, index,
            f"member {members.names[index]!r} is a pickle, which can run any code when it is "
            "opened; it was not",
        )  # fmt: skip
    if lower not in names:
        names.append(lower)
    return names.index(lower)


def _refuse_repeats(samples: _Samples, members: Members, where: str) -> None:
    """A key that comes again after others, or an extension twice in a sample."""
    places = np.array(samples.rows, np.int64) * len(samples.names) + samples.kinds
    again: int | None = None
    if len(np.unique(places)) < len(places):
        seen: set[int] = set()
        for member, place in zip(samples.members, places.tolist(), strict=True):
            if place in seen:
                again = member
                break
            seen.add(place)
    if len(set(samples.keys)) < len(samples.keys):
        known: set[str] = set()
        for first, key in zip(samples.firsts, samples.keys, strict=True):
            if key in known:
                again = first if again is None else min(first, again)
                break
            known.add(key)
    if again is not None:
        key = samples.keys[samples.rows[samples.members.index(again)]]
        raise _wrong(
            where, members, again,
            f"key {key!r} comes a second time (member {members.names[again]!r}); members of a "
            "sample must be adjacent and unique, and a dot inside the key is a common cause",
        )  # fmt: skip


def _refuse_ambiguous(samples: _Samples, members: Members, where: str) -> None:
    """`img.v1.jpg` and `img.v2.jpg` would be one sample `img`; `www.site.jpg` one called `www`."""
    counts = Counter(samples.kinds)
    ends = Counter(
        (row, samples.names[kind].rpartition(".")[2])
        for row, kind in zip(samples.rows, samples.kinds, strict=True)
    ) if any("." in name for name in samples.names) else Counter()  # fmt: skip
    for member, row, kind in zip(samples.members, samples.rows, samples.kinds, strict=True):
        if not ends:
            return
        name = samples.names[kind]
        if "." not in name:
            continue
        if counts[kind] < len(samples.keys) or ends[row, name.rpartition(".")[2]] > 1:
            raise _wrong(
                where, members, member,
                f"member {members.names[member]!r} reads as sample {samples.keys[row]!r} with "
                f"extension {name!r}, since a key ends at its first dot; if that is meant, "
                "index with --dotted, else write the shard with keys that have no dot",
            )  # fmt: skip


def _wrong(where: str, members: Members, index: int, what: str) -> GigabatchError:
    return GigabatchError(f"{where}: at byte {members.offsets[index]}: {what}.")


def _digest(members: Members, kept: Sequence[int]) -> str:
    digest = hashlib.sha256()
    digest.update("\n".join([members.names[i] for i in kept]).encode())
    places = np.array(kept, np.int64)
    digest.update(np.array(members.sizes, "<i8")[places].tobytes())
    if members.checksums:
        digest.update(np.array(members.checksums, "<u4")[places].tobytes())
    return digest.hexdigest()


def _lift(
    file: int, columns: dict[str, pa.Array], wanted: Sequence[str], where: str
) -> list[tuple[pa.Field, pa.Array]]:
    """Fields of the json members, null where a sample has none."""
    if not wanted:
        return []
    if "json.offset" not in columns:
        return [column(name, [None] * len(columns["key"])) for name in wanted]
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    places = zip(columns["json.offset"].tolist(), columns["json.size"].tolist(), strict=True)
    for row, (offset, size) in enumerate(places):
        tree = _json(os.pread(file, size, offset), where, offset, columns, row) if offset else {}
        for name in wanted:
            values[name].append(tree.get(name))
    return [column(name, found) for name, found in values.items()]


def _json(
    data: bytes, where: str, offset: int, columns: dict[str, pa.Array], row: int
) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        key = columns["key"][row].as_py()
        raise GigabatchError(
            f"{where}: at byte {offset}: the json member of sample {key!r} cannot be read: {error}."
        ) from None
    return tree if isinstance(tree, dict) else {}
