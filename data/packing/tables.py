"""Read tables in common formats, in batches: CSV, TSV, JSON lines, Parquet, Arrow.

A table is one file, or a folder or pattern of files of one format, read in the order of their
names. Rows are numbered from 0, without the header.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from gigabatch.data.decode.signatures import describe_bytes
from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.csv_tables import csv_header, csv_rows, find_delimiter
from gigabatch.data.remote.locations import expand
from gigabatch.data.shards.pack_hint import SUFFIXES
from gigabatch.data.shards.unread import unread_data

Row = dict[str, Any]
RowBatch: TypeAlias = "list[Row] | pa.RecordBatch"
BATCH_ROWS = 1024
"""Rows read at a time."""
FILE_BATCH_ROWS = 32
"""Rows read at a time if they contain whole files."""
_COMPRESSED = re.compile(
    r"\.(csv|tsv|jsonl|ndjson|json|parquet|arrow|feather|tar)\.(gz|zst|bz2|xz|zip|lz4)$"
)
_TABLES = ("a Parquet file", "an Arrow file", "a text")
"""Beginnings of what `describe_bytes` calls a table."""
_OTHERS = (".xlsx", ".xls", ".ods", ".orc", ".avro")
"""Tables of formats that are not read."""


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
        source: File, folder or pattern.
        folder: Folder that the file names in a row are relative to, unless another is set.
        columns: Column names.
        types: Arrow type of each column; empty for JSON lines.
        untyped: Whether all cells are text, as in CSV.
        parts: Files or row groups, in order.
        state: Name, size and modification time of each file, to detect a changed table.
    """

    source: Path
    folder: Path
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


def _slice(batch: RowBatch, first: int, rows: int) -> RowBatch:
    return batch[first : first + rows] if isinstance(batch, list) else batch.slice(first, rows)


def table_files(source: Path) -> list[Path]:
    """Return the files of a table in order: a file, those of a folder, or those of a pattern.

    Returns:
        An empty list for a folder without tables.

    Raises:
        GigabatchError: if a pattern matches no file.
    """
    if not os.path.isdir(source):  # `Path.is_dir` raises for a name that is too long
        return list(map(Path, expand([str(source)]))) if _is_pattern(source) else [source]
    # `datasets` caches results in `cache-*.arrow` next to a data set.
    return sorted(path for path in source.iterdir() if _is_table(path))


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith((".", "cache-"))


def _is_pattern(source: Path) -> bool:
    return any(mark in str(source) for mark in "*?[{") and not os.path.exists(source)


def open_table(source: Path, delimiter: str | None = None) -> Table:
    """Open the table at `source`.

    Args:
        source: A file, a folder of files, or a pattern of files.
        delimiter: Character between the fields of CSV files; None finds it in the first lines.

    Raises:
        GigabatchError: if it is not a table, cannot be read, or its files differ in format or
            columns.
    """
    files = table_files(source)
    suffixes = {path.suffix.lower() for path in files}
    if len(suffixes) != 1 or not suffixes <= set(SUFFIXES):
        raise _not_a_table(source, files)
    if delimiter is not None and not suffixes <= {".csv", ".tsv"}:
        raise GigabatchError(f"{source}: --delimiter applies to .csv and .tsv. Remove it.")
    opened = []
    for path in files:
        with _read_errors(path):
            opened.append(_open_file(path, delimiter))
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
    folder = source if source.is_dir() else files[0].parent
    return Table(source, folder, columns, types, suffixes <= {".csv", ".tsv"}, parts, state)


def _not_a_table(source: Path, files: Sequence[Path]) -> GigabatchError:
    """Return the error for files that are not of one table format."""
    suffixes = sorted({path.suffix.lower() for path in files})
    several = f"; it contains {', '.join(suffixes)}" if len(suffixes) > 1 else ""
    if not files and (unread := unread_tables(source)):
        several = f"; {unread[0]} must be unpacked or converted first"
    elif not files and (deeper := [p for p in sorted(source.glob("*/*")) if _is_table(p)]):
        several = f"; {deeper[0].parent} contains tables: pack each such folder into its own set"
    elif not files and (shards := unread_data(os.listdir(source), str(source))):
        several = f"; data there that is not read: {'; '.join(shards)}"
    if len(files) == 1 and files[0].is_file():
        with open(files[0], "rb") as file:
            kind = describe_bytes(file.read(512))
        # A text may be a table with a different name.
        several = f" but {kind}" if kind and not kind.startswith("a text") else ""
        if several and _COMPRESSED.search(files[0].name.lower()):
            several += ", which must be unpacked first"
    return GigabatchError(
        f"{source}: not a table{several}. Name a file that ends in {', '.join(SUFFIXES)}, or a "
        "folder or pattern whose files have one of these formats."
    )


def unread_tables(folder: Path) -> list[str]:
    """Return the names of the folder's files that look like tables but are not read, sorted."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith((".", "cache-")))
    return [n for n in names if _COMPRESSED.search(n.lower()) or n.lower().endswith(_OTHERS)]


_Opened = tuple[tuple[str, ...], dict[str, pa.DataType], list[_Part]]


def _open_file(path: Path, delimiter: str | None) -> _Opened:
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        kind = describe_bytes(file.read(512)) or ""
    if (kind.startswith(("a ", "an ")) and not kind.startswith(_TABLES)) or "compressed" in kind:
        raise ValueError(f"it is {kind}, whatever its name says")
    if suffix in (".csv", ".tsv"):
        return _open_csv(path, delimiter or find_delimiter(path))
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
    names = csv_header(path, delimiter)
    read = partial(_csv_batches, path, delimiter)
    return tuple(names), dict.fromkeys(names, pa.string()), [_Part(None, read)]


def _csv_batches(path: Path, delimiter: str, columns: object, rows: int) -> Iterator[RowBatch]:
    with _read_errors(path):
        yield from _batched(partial(csv_rows, path, delimiter), columns, rows)


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
    except UnicodeDecodeError as error:
        raise GigabatchError(
            f"{path}: the table is not UTF-8 text (byte {error.object[error.start]:#04x}). Save it "
            f"as UTF-8, as `iconv -f ENCODING -t UTF-8` does."
        ) from error
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        problem = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise GigabatchError(
            f"{path}: the table cannot be read: {problem}. Check the path, or fix the file."
        ) from error
