"""Read the samples to pack: rows of a table, or samples of other shards.

A source is checked completely before anything is written. Its order is a formula, so packing can
resume at any row.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gigabatch.data.decode.signatures import describe_bytes
from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.columns import NO_FILE, PackSettings, choose_columns
from gigabatch.data.packing.members import (
    FILES,
    MEMBERS,
    InvalidRow,
    NumericColumns,
    content_problem,
    detect_type,
    extension,
    file_problem,
    first_caption,
    json_member,
    read_file,
    relative_name,
)
from gigabatch.data.packing.row_store import RowStore
from gigabatch.data.packing.rows import find_repeated_key, packing_order
from gigabatch.data.packing.splits import SplitColumn
from gigabatch.data.packing.tables import BATCH_ROWS, FILE_BATCH_ROWS, Row, Table
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.reader import DamagedMember, Reader

Sample = dict[str, Any]
"""`__key__`, and the bytes of each member by its extension."""
_TABLE_SETTINGS = (
    "folder", "file_column", "caption_column", "key_column", "json_columns", "delimiter",
)  # fmt: skip
LISTED_ROWS = 5
"""Maximum number of rows listed in an error."""
THREADS = 32
"""Number of files opened in parallel; on a shared file system, opening one takes milliseconds."""


@dataclass(frozen=True)
class Skipped:
    """A row without a usable file or without a caption; `why` states the problem."""

    row: int
    file: str | None
    why: str


class Samples(Protocol):
    """A source of samples.

    Attributes:
        settings: Settings of the pack, with guessed values filled in.
        fingerprint: JSON values that change if the source changes.
    """

    settings: PackSettings
    fingerprint: dict[str, Any]

    def check(self) -> int:
        """Check all rows and return their number.

        Raises:
            GigabatchError: if a row cannot be packed.
        """

    def warning(self, out: Path) -> str | None:
        """Return a warning about the rows that `check` read, or None.

        Args:
            out: The output folder.
        """

    def read(self, start: int) -> Iterator[Sample | Skipped]:
        """Read rows in packing order from position `start`; call `check` first."""


@dataclass
class _RowProblems:
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, row: int, problem: object) -> None:
        self.count += 1
        if len(self.first) < LISTED_ROWS:
            self.first.append(f"row {row}: {problem}")

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return "; ".join(self.first) + (f"; and {more:,} more" if more else "")


class TableSamples:
    """Samples made from a table's rows, with files on disk or embedded in the table."""

    def __init__(self, table: Table, settings: PackSettings) -> None:
        self.table = table
        self.columns = choose_columns(table, settings)
        self.folder = Path(os.path.abspath(settings.folder or table.folder))
        self.settings = settings.model_copy(
            update={
                "folder": self.folder if self.columns.file and not self.columns.embedded else None,
                "file_column": self.columns.file or NO_FILE,
                "caption_column": self.columns.captions,
                "json_columns": self.columns.extra,
            }
        )
        self.fingerprint = {"table": table.state}
        self._store: RowStore | None = None
        self._count = 0
        self._numeric: frozenset[str] = frozenset()
        self._split = SplitColumn(())

    def check(self) -> int:
        """Check all rows and return their number.

        Embedded files are not read, and files on disk are only looked up.
        """
        if self.settings.shuffle_seed is not None:
            self._store = RowStore(self.table)
        invalid, missing = _RowProblems(), _RowProblems()
        numeric = NumericColumns(self.columns.extra if self.table.untyped else ())
        columns = self.columns.to_read(include_file=not self.columns.embedded)
        self._split = SplitColumn(self.columns.extra)
        rows = self._split.observe(numeric.observe(self.table.rows(columns=columns)))
        for number, result in self._convert(rows, load=False):
            self._count = number + 1
            if isinstance(result, InvalidRow):
                invalid.add(number, result)
            elif isinstance(result, Skipped):
                missing.add(number, result.why)
        self._numeric = numeric.names()
        if invalid.count:
            raise GigabatchError(
                f"{self._summary(invalid)}. Fix the rows and rerun `gigabatch data pack`."
            )
        if missing.count and not self.settings.skip_missing:
            raise GigabatchError(
                f"{self._summary(missing)}. Restore the missing parts, or set --skip-missing to "
                "skip these rows and list them in skipped.jsonl."
            )
        self._reject_repeated_keys()
        return self._count

    def warning(self, out: Path) -> str | None:
        """Return a warning about the rows that `check` read, or None."""
        return None if self.settings.merge_splits else self._split.warning(self.table.source, out)

    def _summary(self, problems: _RowProblems) -> str:
        rows = f"{problems.count:,} of {self._count:,} rows cannot be packed"
        return f"{self.table.source}: {rows}: {problems}"

    def _reject_repeated_keys(self) -> None:
        column = self.columns.key
        if column is None:
            return
        problem = find_repeated_key(
            lambda: (str(row[column]) for _, row in self.table.rows(columns=[column]))
        )
        if problem:
            raise GigabatchError(
                f"{self.table.source}: {problem}. Set --key-column to a column of unique values, "
                "or omit it to number the rows."
            )

    def read(self, start: int) -> Iterator[Sample | Skipped]:
        """Read rows in packing order from position `start`."""
        for number, result in self._convert(self._rows(start), load=True):
            where = f"{self.table.source}: row {number}"
            if isinstance(result, InvalidRow):
                raise GigabatchError(
                    f"{where}: {result}. Fix the row and rerun `gigabatch data pack`."
                )
            if isinstance(result, Skipped) and not self.settings.skip_missing:
                raise GigabatchError(
                    f"{where}: {result.why}. Restore it, or set --skip-missing to skip such rows, "
                    "and rerun `gigabatch data pack`; finished shards are kept."
                )
            yield result

    def _rows(self, start: int) -> Iterator[tuple[int, Row]]:
        if self._store is None:
            rows = FILE_BATCH_ROWS if self.columns.embedded else BATCH_ROWS
            yield from self.table.rows(start, self.columns.to_read(include_file=True), rows)
        else:
            for number in packing_order(start, self._count, self.settings.shuffle_seed):
                yield number, self._store.row(number)

    def _convert(
        self, rows: Iterable[tuple[int, Row]], load: bool
    ) -> Iterator[tuple[int, Sample | Skipped | InvalidRow]]:
        """Convert numbered rows to samples, in order; `load=False` omits their files."""

        def convert(numbered: tuple[int, Row]) -> tuple[int, Sample | Skipped | InvalidRow]:
            try:
                return numbered[0], self._sample(*numbered, load)
            except InvalidRow as error:
                return numbered[0], error

        if self.columns.embedded:
            yield from map(convert, rows)
            return
        rows = iter(rows)
        with ThreadPoolExecutor(THREADS) as pool:
            while group := list(islice(rows, THREADS)):
                yield from pool.map(convert, group)

    def _sample(self, number: int, row: Row, load: bool) -> Sample | Skipped:
        sample: Sample = {"__key__": self._key(number, row)}
        if names := self.columns.in_json(row):
            sample["json"] = json_member({name: self._json_value(name, row) for name in names})
        file_name, member = self._file_member(row, load)
        if self.columns.captions:
            sample["txt"] = first_caption(row.get(self.columns.captions[0]))
            if sample["txt"] is None:
                return Skipped(number, file_name, "no caption")
        if isinstance(member, str):
            return Skipped(number, file_name, member)
        return sample | member

    def _file_member(self, row: Row, load: bool) -> tuple[str | None, Sample | str]:
        """Return a file's name, and its member by extension or the problem as text."""
        if self.columns.file is None:
            return None, {}
        member_of = self._embedded_file if self.columns.embedded else self._file_on_disk
        return member_of(row.get(self.columns.file), load)

    def _file_on_disk(self, value: Any, load: bool) -> tuple[str | None, Sample | str]:
        name = relative_name(value, self.folder)
        problem = file_problem(self.folder, name)
        if problem or not load:
            return name, problem or {}
        data = read_file(self.folder, str(name))
        if isinstance(data, str):
            return name, data
        kind = str(extension(name))
        problem = content_problem(kind, data)
        return name, f"{name!r}: {problem}" if problem else {kind: data}

    def _embedded_file(self, value: Any, load: bool) -> tuple[str | None, Sample | str]:
        """Return name and member; its type comes from a known extension or from its first bytes."""
        file = value if isinstance(value, dict) else {"bytes": value}
        name, data = file.get("path"), file["bytes"]
        if not load:
            return name, {}
        if not data:
            return name, "no file content"
        kind = extension(name) or detect_type(data)
        if kind is None:
            actual = describe_bytes(data) or "not recognized"
            return name, f"file content is {actual}, not of a known type ({', '.join(FILES)})"
        if problem := content_problem(kind, data):
            return name, f"file content of {name!r}: {problem}"
        return name, {kind: data}

    def _key(self, number: int, row: Row) -> str:
        if self.columns.key is None:
            return f"{number:0{max(6, len(str(self._count - 1)))}d}"
        value = row.get(self.columns.key)
        if value is None or value == "":
            raise InvalidRow("no key")
        name = str(value)
        # Readers end a key at its first dot, and ignore names that start with __.
        if re.search(r"[./\\\s\x00-\x1f\x7f]", name) or name.startswith("__") or len(name) > 200:
            raise InvalidRow(
                f"{name!r} is not a valid key (no dot, slash or space, no leading __, at most 200 "
                "characters)"
            )
        return name

    def _json_value(self, name: str, row: Row) -> Any:
        value = row.get(name)
        return json.loads(value) if name in self._numeric and value is not None else value


class ShardSamples:
    """Samples of existing shards, unchanged."""

    def __init__(self, index: Index, settings: PackSettings) -> None:
        self.index, self.settings = index, settings
        self.fingerprint = {"index": index.digest}
        for name in _TABLE_SETTINGS:
            if getattr(settings, name):
                option = "--" + name.replace("_", "-").replace("columns", "column")
                raise GigabatchError(
                    f"{index.source}: {option} applies to tables, but this source contains shards. "
                    f"Remove {option}."
                )

    def check(self) -> int:
        """Check member types and keys, and return the number of samples."""
        for member in self.index.members:
            if member.rpartition(".")[2] not in MEMBERS:
                raise GigabatchError(
                    f"{self.index.source}: members of type .{member} cannot be packed; supported "
                    f"types: {', '.join(MEMBERS)}. Remove these members from the shards."
                )
        if problem := find_repeated_key(self._keys):
            raise GigabatchError(
                f"{self.index.source}: {problem}. Keys of a pack must be unique; pack each shard "
                "into a separate folder."
            )
        return len(self.index)

    def warning(self, out: Path) -> str | None:
        """Return None: `open_index` warns of what it does not read."""
        return None

    def _keys(self) -> Iterator[str]:
        for first in range(0, len(self.index), BATCH_ROWS):
            rows = np.arange(first, min(first + BATCH_ROWS, len(self.index)))
            yield from self.index.values("key", rows)

    def read(self, start: int) -> Iterator[Sample | Skipped]:
        """Read samples in packing order from position `start`."""
        rows = packing_order(start, len(self.index), self.settings.shuffle_seed)
        with Reader(self.index) as reader:
            while group := list(islice(rows, FILE_BATCH_ROWS)):
                samples = reader.read_batch(np.array(group), self.index.members)
                for row, members in zip(group, samples, strict=True):
                    for member in members.values():
                        if isinstance(member, DamagedMember):
                            raise GigabatchError(member.why)
                    yield {"__key__": self.index.key(row)} | members
