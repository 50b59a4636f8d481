"""Read tables in common formats, in batches: CSV, TSV, JSON lines, Parquet, Arrow.

A table is one file, or a folder whose files have one format and are read in the order of their
names. Rows are numbered from 0, without the header. Only `RowStore`, which returns rows in any
order, loads a table into memory.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.pack_hint import SUFFIXES

Row = dict[str, Any]
RowBatch: TypeAlias = "list[Row] | pa.RecordBatch"
STORE_BYTES = 4 << 30
"""Maximum memory of a `RowStore`."""
BATCH_ROWS = 1024
"""Rows read at a time."""
FILE_BATCH_ROWS = 32
"""Rows read at a time if they contain whole files."""
CELL_BYTES = 64 << 20
"""Maximum size of a CSV cell; an unclosed quote would otherwise include the rest of the file."""


class _Read(Protocol):
    def __call__(self, columns: Sequence[str] | None, rows: int) -> Iterable[RowBatch]: ...


@dataclass(frozen=True)
class _Part:
    """A file, or a row group of one; `rows` is None if unknown before reading."""

    rows: int | None
    read: _Read


@dataclass(frozen=True)
class Table:
    """A table that has been opened but not read.

    Attributes:
        source: File or folder.
        columns: Column names.
        types: Arrow type of each column; empty for JSON lines.
        untyped: Whether all cells are text, as in CSV.
        parts: Files or row groups, in order.
        state: Name, size and modification time of each file, to detect a changed table.
    """

    source: Path
    columns: tuple[str, ...]
    types: dict[str, pa.DataType]
    untyped: bool
    parts: tuple[_Part, ...]
    state: list[list[Any]]

    def batches(
        self, start: int = 0, columns: Sequence[str] | None = None, rows: int = BATCH_ROWS
    ) -> Iterator[RowBatch]:
        """Read from row `start` to the end.

        Args:
            start: Number of the first row.
            columns: Columns to read; None reads all. JSON lines are always read completely.
            rows: Maximum number of rows in a batch.
        """
        for part in self.parts:
            if part.rows is not None and part.rows <= start:
                start -= part.rows
                continue
            for batch in part.read(columns=columns, rows=rows):
                skipped = min(start, len(batch))
                start -= skipped
                for first in range(skipped, len(batch), rows):
                    yield _slice(batch, first, rows)

    def rows(
        self, start: int = 0, columns: Sequence[str] | None = None, rows: int = BATCH_ROWS
    ) -> Iterator[tuple[int, Row]]:
        """Read like `batches`, and yield (row number, row)."""
        for batch in self.batches(start, columns, rows):
            batch_rows = batch if isinstance(batch, list) else batch.to_pylist()
            yield from enumerate(batch_rows, start)
            start += len(batch_rows)


class RowStore:
    """All rows of a table in memory, for reading in any order.

    Uncompressed Arrow files stay on disk, memory-mapped.
    """

    def __init__(self, table: Table) -> None:
        """Read the table.

        Raises:
            GigabatchError: if its rows take more than `STORE_BYTES`.
        """
        self._batches: list[Any] = []
        before, json_bytes, starts = pa.total_allocated_bytes(), 0, [0]
        for batch in table.batches():
            if isinstance(batch, list):  # Dictionaries would take several times as much as JSON.
                batch = [json.dumps(row).encode() for row in batch]
                json_bytes += sum(map(len, batch)) + 41 * len(batch)
            self._batches.append(batch)
            starts.append(starts[-1] + len(batch))
            if pa.total_allocated_bytes() - before + json_bytes > STORE_BYTES:
                raise GigabatchError(
                    f"{table.source}: the table cannot be shuffled: its rows take more than "
                    f"{STORE_BYTES >> 30} GiB of memory. Pack it without shuffle_seed, then pack "
                    "the resulting shards with shuffle_seed; shards can be read in any order."
                )
        self._starts = np.array(starts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, number: int) -> Row:
        """Return row `number`."""
        index = int(np.searchsorted(self._starts, number, side="right")) - 1
        batch, offset = self._batches[index], number - int(self._starts[index])
        if isinstance(batch, list):
            row: Row = json.loads(batch[offset])
            return row
        return dict(batch.slice(offset, 1).to_pylist()[0])


def _slice(batch: RowBatch, first: int, rows: int) -> RowBatch:
    return batch[first : first + rows] if isinstance(batch, list) else batch.slice(first, rows)


def table_files(source: Path) -> list[Path]:
    """Return the files of a table in order; empty for a folder without tables."""
    if not source.is_dir():
        return [source]
    # `datasets` caches results in `cache-*.arrow` next to a data set.
    return sorted(
        path
        for path in source.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith((".", "cache-"))
    )


def open_table(source: Path) -> Table:
    """Open the table at `source`.

    Raises:
        GigabatchError: if it is not a table, cannot be read, or its files differ in format or
            columns.
    """
    files = table_files(source)
    suffixes = {path.suffix.lower() for path in files}
    if len(suffixes) != 1 or not suffixes <= set(SUFFIXES):
        several = f"; it contains {', '.join(sorted(suffixes))}" if len(suffixes) > 1 else ""
        raise GigabatchError(
            f"{source}: not a table{several}. Name a file that ends in {', '.join(SUFFIXES)}, or a "
            "folder whose files have one of these formats."
        )
    opened = []
    for path in files:
        with _read_errors(path):
            opened.append(_open_file(path))
    columns, types, _ = opened[0]
    for path, (file_columns, file_types, _) in zip(files, opened, strict=True):
        retyped = {name for name in types if types[name] != file_types.get(name)}
        differences = set(file_columns) ^ set(columns) | retyped
        if differences and types:
            raise GigabatchError(
                f"{path}: columns {', '.join(sorted(differences))} or their types differ from "
                f"{files[0].name}. Pack the two files separately."
            )
    # JSON lines may differ in their fields: take the union over all files.
    columns = tuple(dict.fromkeys(name for file_columns, _, _ in opened for name in file_columns))
    parts = tuple(part for _, _, parts in opened for part in parts)
    state = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return Table(source, columns, types, suffixes <= {".csv", ".tsv"}, parts, state)


_Opened = tuple[tuple[str, ...], dict[str, pa.DataType], list[_Part]]


def _open_file(path: Path) -> _Opened:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _open_csv(path, "," if suffix == ".csv" else "\t")
    if suffix in (".jsonl", ".ndjson"):
        # Read every line now: a field may first appear in the last one.
        names = dict.fromkeys(name for row in _json_rows(path) for name in row)
        return tuple(names), {}, [_Part(None, partial(_batched, partial(_json_rows, path)))]
    return _open_parquet(path) if suffix == ".parquet" else _open_arrow(path)


def _batched(read: Callable[[], Iterator[Row]], columns: object, rows: int) -> Iterator[RowBatch]:
    remaining = read()
    while batch := list(islice(remaining, rows)):
        yield batch


def _open_csv(path: Path, delimiter: str) -> _Opened:
    with open(path, newline="", encoding="utf-8-sig") as file:
        names: list[str] = next(_csv_reader(file, delimiter), [])
    if not names or len(set(names)) < len(names) or "" in names:
        raise ValueError("the first line must name the columns, each with a different name")
    types = dict.fromkeys(names, pa.string())
    read = partial(_csv_rows, path, delimiter)
    return tuple(names), types, [_Part(None, partial(_batched, read))]


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV file; cells are text, empty ones None."""
    with _read_errors(path), open(path, newline="", encoding="utf-8-sig") as file:
        reader = _csv_reader(file, delimiter)
        names: list[str] = next(reader, [])
        for cells in reader:
            if not cells:
                continue  # A blank line is not a row.
            if len(cells) != len(names):
                raise ValueError(
                    f"the row that ends at line {reader.line_num} has {len(cells)} fields, but the "
                    f"first line has {len(names)}"
                )
            yield {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _csv_reader(file: TextIO, delimiter: str) -> Any:
    # Applies to the whole process; Python's default of 128 KiB is too small for long captions.
    csv.field_size_limit(CELL_BYTES)
    return csv.reader(file, delimiter=delimiter, strict=True)


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON lines file."""
    with _read_errors(path), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object {{...}}")
            yield row


def _open_parquet(path: Path) -> _Opened:
    with pq.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    parts = [
        _Part(metadata.row_group(group).num_rows, partial(_read_group, path, metadata, group))
        for group in range(metadata.num_row_groups)
    ]
    return *_schema_columns(schema), parts


def _read_group(
    path: Path, metadata: Any, group: int, columns: Sequence[str] | None, rows: int
) -> Iterator[RowBatch]:
    # Buffered, because a row group of images may be larger than memory.
    with (
        _read_errors(path),
        pq.ParquetFile(path, metadata=metadata, buffer_size=1 << 20, pre_buffer=False) as file,
    ):
        yield from file.iter_batches(rows, [group], columns, use_threads=False)


def _open_arrow(path: Path) -> _Opened:
    """Open an Arrow file; `datasets` writes the stream format, other tools the file format."""
    with pa.memory_map(str(path)) as file:
        try:
            schema = pa.ipc.open_file(file).schema
        except pa.ArrowInvalid:
            file.seek(0)
            schema = pa.ipc.open_stream(file).schema
    return *_schema_columns(schema), [_Part(None, partial(_read_arrow, path))]


def _read_arrow(path: Path, columns: Sequence[str] | None, rows: int) -> Iterator[RowBatch]:
    with _read_errors(path):
        file = pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_file(file)
            batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            batches = pa.ipc.open_stream(file)
        for batch in batches:
            yield batch if columns is None else batch.select(columns)


def _schema_columns(schema: pa.Schema) -> tuple[tuple[str, ...], dict[str, pa.DataType]]:
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("two columns have the same name")
    return tuple(schema.names), {field.name: field.type for field in schema}


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Convert read errors to a one-line GigabatchError that names the file."""
    try:
        yield
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        problem = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise GigabatchError(
            f"{path}: the table cannot be read: {problem}. Check the path, or fix the file."
        ) from error
