"""What is packed: the rows of a table, or the samples of shards, one after another.

Both are checked before anything is written, and every fault names its row. The order is a formula,
so that packing goes on at any place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.columns import NO_FILE, PackSettings, choose
from gigabatch.data.packing.members import (
    FILES,
    MEMBERS,
    Numbers,
    Wrong,
    extension,
    file_inside,
    first_caption,
    json_member,
    kind_of_bytes,
    look_at_file,
    read_file,
)
from gigabatch.data.packing.tables import HEAVY, PIECE, Held, Row, Table
from gigabatch.data.rng import key, permute
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.reader import DamagedMember, Reader

Sample = dict[str, Any]
"""`__key__`, and the bytes of each member by its extension."""
SHOWN = 5
"""Faulty rows that one error lists."""
THREADS = 32
"""Files opened at once: a shared file system takes milliseconds to open one."""


@dataclass(frozen=True)
class Skipped:
    """A row that lacks its file or its caption."""

    row: int
    file: str | None
    why: str


class Samples(Protocol):
    """`settings`: with what was guessed. `fingerprint`: what tells this source from another."""

    settings: PackSettings
    fingerprint: dict[str, Any]

    def check(self) -> int:
        """The number of rows. Raises GigabatchError where they cannot be packed."""

    def read(self, start: int) -> Iterator[Sample | Skipped]:
        """What is at each place of the packing order, from `start` on. After `check`."""


@dataclass
class _Faults:
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, row: int, why: object) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"row {row}: {why}")

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return "; ".join(self.first) + (f"; and {more:,} more" if more else "")


class TableSamples:
    """The rows of a table, with their files or the bytes that it holds."""

    def __init__(self, table: Table, settings: PackSettings) -> None:
        self.table = table
        self.columns = choose(table, settings)
        beside = table.source if table.source.is_dir() else table.source.parent
        self.folder = Path(os.path.abspath(settings.folder or beside))
        self.settings = settings.model_copy(
            update={
                "folder": self.folder if self.columns.file and not self.columns.embedded else None,
                "file_column": self.columns.file or NO_FILE,
                "caption_column": self.columns.captions,
                "json_columns": self.columns.rest,
            }
        )
        self.fingerprint = {"table": table.state}
        self._held: Held | None = None
        self._count = 0
        self._numbers: frozenset[str] = frozenset()

    def check(self) -> int:
        """Reads all of the table but the files' bytes, and looks at each file."""
        if self.settings.shuffle_seed is not None:
            self._held = Held(self.table)
        wrong, lacking = _Faults(), _Faults()
        numbers = Numbers(self.columns.rest if self.table.untyped else ())
        columns = self.columns.used(files=not self.columns.embedded)
        rows = numbers.watch(self.table.rows(columns=columns))
        for number, found in self._each(rows, load=False):
            self._count = number + 1
            if isinstance(found, Wrong):
                wrong.add(number, found)
            elif isinstance(found, Skipped):
                lacking.add(number, found.why)
        self._numbers = numbers.found()
        if wrong.count:
            raise GigabatchError(f"{self._told(wrong)}. Mend the table.")
        if lacking.count and not self.settings.skip_missing:
            raise GigabatchError(
                f"{self._told(lacking)}. Restore what they lack, or set skip_missing to leave them "
                "out (skipped.jsonl then names each)."
            )
        self._refuse_repeated_keys()
        return self._count

    def _told(self, faults: _Faults) -> str:
        rows = f"{faults.count:,} of {self._count:,} rows cannot be packed"
        return f"{self.table.source}: {rows}: {faults}"

    def _refuse_repeated_keys(self) -> None:
        column = self.columns.key
        if column is None:
            return
        again = repeated(lambda: (str(row[column]) for _, row in self.table.rows(columns=[column])))
        if again:
            raise GigabatchError(
                f"{self.table.source}: {again}. A key names one sample: set key_column to a "
                "column without repeats, or leave it out to number the rows."
            )

    def read(self, start: int) -> Iterator[Sample | Skipped]:
        for number, found in self._each(self._rows(start), load=True):
            where = f"{self.table.source}: row {number}"
            if isinstance(found, Wrong):
                raise GigabatchError(f"{where}: {found}. Mend the table.")
            if isinstance(found, Skipped) and not self.settings.skip_missing:
                raise GigabatchError(
                    f"{where}: {found.why}. Restore it, or set skip_missing to leave such rows "
                    "out, and pack again: finished shards are kept."
                )
            yield found

    def _rows(self, start: int) -> Iterator[tuple[int, Row]]:
        if self._held is None:
            rows = HEAVY if self.columns.embedded else PIECE
            yield from self.table.rows(start, self.columns.used(files=True), rows)
        else:
            for number in walk(start, self._count, self.settings.shuffle_seed):
                yield number, self._held.row(number)

    def _each(
        self, rows: Iterable[tuple[int, Row]], load: bool
    ) -> Iterator[tuple[int, Sample | Skipped | Wrong]]:
        """What becomes of each row, in order; without its file if not `load`."""

        def work(numbered: tuple[int, Row]) -> tuple[int, Sample | Skipped | Wrong]:
            try:
                return numbered[0], self._sample(*numbered, load)
            except Wrong as wrong:
                return numbered[0], wrong

        if self.columns.embedded:
            yield from map(work, rows)
            return
        rows = iter(rows)
        with ThreadPoolExecutor(THREADS) as pool:
            while group := list(islice(rows, THREADS)):
                yield from pool.map(work, group)

    def _sample(self, number: int, row: Row, load: bool) -> Sample | Skipped:
        sample: Sample = {"__key__": self._key(number, row)}
        if names := self.columns.in_json(row):
            sample["json"] = json_member({name: self._value(name, row) for name in names})
        name, found = self._found(row, load)
        if self.columns.captions:
            sample["txt"] = first_caption(row.get(self.columns.captions[0]))
            if sample["txt"] is None:
                return Skipped(number, name, "has no caption")
        if isinstance(found, str):
            return Skipped(number, name, found)
        return sample | found

    def _found(self, row: Row, load: bool) -> tuple[str | None, Sample | str]:
        """The name of a row's file, with the member that it becomes or what is wrong."""
        if self.columns.file is None:
            return None, {}
        find = self._embedded if self.columns.embedded else self._file
        return find(row.get(self.columns.file), load)

    def _file(self, value: Any, load: bool) -> tuple[str | None, Sample | str]:
        """The same of a file in the folder."""
        name = file_inside(value)
        wrong = look_at_file(self.folder, name)
        if wrong or not load:
            return name, wrong or {}
        found = read_file(self.folder, str(name))
        return name, found if isinstance(found, str) else {str(extension(name)): found}

    def _embedded(self, value: Any, load: bool) -> tuple[str | None, Sample | str]:
        """The same of bytes in the table: typed by their name if it tells, else as they begin."""
        held = value if isinstance(value, dict) else {"bytes": value}
        name, data = held.get("path"), held["bytes"]
        if not load:
            return name, {}
        if not data:
            return name, "holds no bytes"
        kind = extension(name) or kind_of_bytes(data)
        if kind is None:
            return name, f"holds bytes of no known type ({', '.join(FILES)})"
        return name, {kind: data}

    def _key(self, number: int, row: Row) -> str:
        if self.columns.key is None:
            return f"{number:0{max(6, len(str(self._count - 1)))}d}"
        value = row.get(self.columns.key)
        if value is None or value == "":
            raise Wrong("has no key")
        name = str(value)
        # A reader ends the key at its first dot, and passes over names that start with __.
        if re.search(r"[./\\\s\x00-\x1f\x7f]", name) or name.startswith("__") or len(name) > 200:
            raise Wrong(f"{name!r} is no key, which has no dot, slash or space")
        return name

    def _value(self, name: str, row: Row) -> Any:
        value = row.get(name)
        return json.loads(value) if name in self._numbers and value is not None else value


class ShardSamples:
    """The samples of shards, as they are."""

    def __init__(self, index: Index, settings: PackSettings) -> None:
        self.index, self.settings = index, settings
        self.fingerprint = {"index": index.digest}
        for name in ("folder", "file_column", "caption_column", "key_column", "json_columns"):
            if getattr(settings, name):
                raise GigabatchError(
                    f"{index.source}: {name} is for tables, and shards are packed as they are. "
                    "Leave it out."
                )

    def check(self) -> int:
        for member in self.index.members:
            if member.rpartition(".")[2] not in MEMBERS:
                raise GigabatchError(
                    f"{self.index.source}: members of type .{member} are not packed; those that "
                    f"are: {', '.join(MEMBERS)}."
                )
        if again := repeated(self._keys):
            raise GigabatchError(
                f"{self.index.source}: {again}. Samples of one set need keys of their own; pack "
                "the shards apart."
            )
        return len(self.index)

    def _keys(self) -> Iterator[str]:
        for first in range(0, len(self.index), PIECE):
            rows = np.arange(first, min(first + PIECE, len(self.index)))
            yield from self.index.values("key", rows)

    def read(self, start: int) -> Iterator[Sample | Skipped]:
        rows = walk(start, len(self.index), self.settings.shuffle_seed)
        with Reader(self.index) as reader:
            while group := list(islice(rows, HEAVY)):
                found = reader.read_batch(np.array(group), self.index.members)
                for row, members in zip(group, found, strict=True):
                    for member in members.values():
                        if isinstance(member, DamagedMember):
                            raise GigabatchError(member.why)
                    yield {"__key__": self.index.key(row)} | members


def walk(start: int, count: int, seed: int | None) -> Iterator[int]:
    """The rows at places `start` to `count` - 1: as they are, or permuted by `seed`."""
    for first in range(start, count, PIECE):
        places = np.arange(first, min(first + PIECE, count), dtype=np.int64)
        if seed is not None:
            places = permute(places, count, key(seed, "pack"))
        yield from places.tolist()


def repeated(keys: Callable[[], Iterator[str]]) -> str | None:
    """Which key comes twice, and where. Holds eight bytes a key; called again if some may."""
    hashes, counts = np.unique(np.fromiter(map(hash, keys()), np.int64), return_counts=True)
    suspects = set(hashes[counts > 1].tolist())
    seen: dict[str, int] = {}
    for row, name in enumerate(keys() if suspects else ()):
        if hash(name) in suspects and seen.setdefault(name, row) != row:
            return f"the key {name!r} comes twice, in rows {seen[name]} and {row}"
    return None
