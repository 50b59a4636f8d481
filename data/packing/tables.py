"""Tables of the common formats, read in pieces: CSV, TSV, JSON lines, Parquet, Arrow.

A table is a file, or a folder of files of one format that are read one after another, in the order
of their names. Rows are numbered from 0; a header is no row. Nothing is loaded whole, except where
rows are wanted in another order than the table's (`Held`).
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
Piece: TypeAlias = "list[Row] | pa.RecordBatch"
HELD_BYTES = 4 << 30
"""Memory that the rows of a table may take where they are wanted in another order."""
PIECE = 1024
"""Rows read at a time."""
HEAVY = 32
"""Rows read at a time where they hold whole files."""
CELL_BYTES = 64 << 20
"""Of one cell of a CSV file, at most: a quote that is never closed takes in all that follows."""


class _Read(Protocol):
    def __call__(self, columns: Sequence[str] | None, rows: int) -> Iterable[Piece]: ...


@dataclass(frozen=True)
class _Part:
    """A file, or a row group of one; `rows` is None where it is not known before reading."""

    rows: int | None
    read: _Read


@dataclass(frozen=True)
class Table:
    """`types`: of the columns, empty for JSON lines. `untyped`: all cells are text, as in CSV.
    `state`: the files' names, sizes and times, by which the same table is known again."""

    source: Path
    columns: tuple[str, ...]
    types: dict[str, pa.DataType]
    untyped: bool
    parts: tuple[_Part, ...]
    state: list[list[Any]]

    def pieces(
        self, start: int = 0, columns: Sequence[str] | None = None, rows: int = PIECE
    ) -> Iterator[Piece]:
        """The rows from number `start` on, some at a time; `columns` limits what is read (JSON
        lines come whole)."""
        for part in self.parts:
            if part.rows is not None and part.rows <= start:
                start -= part.rows
                continue
            for piece in part.read(columns=columns, rows=rows):
                skipped = min(start, len(piece))
                start -= skipped
                for first in range(skipped, len(piece), rows):
                    yield _cut(piece, first, rows)

    def rows(
        self, start: int = 0, columns: Sequence[str] | None = None, rows: int = PIECE
    ) -> Iterator[tuple[int, Row]]:
        """(number, row) of each row from `start` on."""
        for piece in self.pieces(start, columns, rows):
            found = piece if isinstance(piece, list) else piece.to_pylist()
            yield from enumerate(found, start)
            start += len(found)


class Held:
    """The rows of a table, in memory (an uncompressed Arrow file stays on disk), for any order."""

    def __init__(self, table: Table) -> None:
        self._pieces: list[Any] = []
        before, texts, starts = pa.total_allocated_bytes(), 0, [0]
        for piece in table.pieces():
            if isinstance(piece, list):  # as JSON: dictionaries would take several times as much
                piece = [json.dumps(row).encode() for row in piece]
                texts += sum(map(len, piece)) + 41 * len(piece)
            self._pieces.append(piece)
            starts.append(starts[-1] + len(piece))
            if pa.total_allocated_bytes() - before + texts > HELD_BYTES:
                raise GigabatchError(
                    f"{table.source}: cannot be shuffled: its rows take more than "
                    f"{HELD_BYTES >> 30} GiB of memory. Pack it without shuffle_seed, then pack "
                    "those shards with it: shards are read in any order."
                )
        self._starts = np.array(starts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, number: int) -> Row:
        at = int(np.searchsorted(self._starts, number, side="right")) - 1
        piece, place = self._pieces[at], number - int(self._starts[at])
        if isinstance(piece, list):
            row: Row = json.loads(piece[place])
            return row
        return dict(piece.slice(place, 1).to_pylist()[0])


def _cut(piece: Piece, first: int, rows: int) -> Piece:
    return piece[first : first + rows] if isinstance(piece, list) else piece.slice(first, rows)


def table_files(source: Path) -> list[Path]:
    """The files of a table; none where `source` is a folder without any."""
    if not source.is_dir():
        return [source]
    # `cache-*.arrow` is what `datasets` leaves beside a data set that it has worked on.
    return sorted(
        path
        for path in source.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith((".", "cache-"))
    )


def open_table(source: Path) -> Table:
    """The table at `source`. Raises GigabatchError for what is none, or files that differ."""
    files = table_files(source)
    kinds = {path.suffix.lower() for path in files}
    if len(kinds) != 1 or not kinds <= set(SUFFIXES):
        found = f" (it has {', '.join(sorted(kinds))})" if len(kinds) > 1 else ""
        raise GigabatchError(
            f"{source}: is no table. Name a file that ends in {', '.join(SUFFIXES)}, or a folder "
            f"with files of one of these kinds{found}."
        )
    opened = []
    for path in files:
        with _reading(path):
            opened.append(_open(path))
    columns, types, _ = opened[0]
    for path, (own, own_types, _) in zip(files, opened, strict=True):
        differ = set(own) ^ set(columns) | {c for c in types if types[c] != own_types.get(c)}
        if differ and types:
            raise GigabatchError(
                f"{path}: differs from {files[0].name} in the columns "
                f"{', '.join(sorted(differ))} or their types. Pack the two apart."
            )
    # JSON lines have no fixed columns: those of all files.
    columns = tuple(dict.fromkeys(name for own, _, _ in opened for name in own))
    parts = tuple(part for _, _, parts in opened for part in parts)
    state = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return Table(source, columns, types, kinds <= {".csv", ".tsv"}, parts, state)


_Opened = tuple[tuple[str, ...], dict[str, pa.DataType], list[_Part]]


def _open(path: Path) -> _Opened:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _open_csv(path, "," if kind == ".csv" else "\t")
    if kind in (".jsonl", ".ndjson"):
        # All of its lines: a field may come first in the last one, and none is to be lost.
        names = dict.fromkeys(name for row in _lines(path) for name in row)
        return tuple(names), {}, [_Part(None, partial(_gather, partial(_lines, path)))]
    return _open_parquet(path) if kind == ".parquet" else _open_arrow(path)


def _gather(read: Callable[[], Iterator[Row]], columns: object, rows: int) -> Iterator[Piece]:
    found = read()
    while piece := list(islice(found, rows)):
        yield piece


def _open_csv(path: Path, delimiter: str) -> _Opened:
    with open(path, newline="", encoding="utf-8-sig") as file:
        names: list[str] = next(_csv_reader(file, delimiter), [])
    if not names or len(set(names)) < len(names) or "" in names:
        raise ValueError("its first line must name the columns, each once")
    types = dict.fromkeys(names, pa.string())
    read = partial(_cells, path, delimiter)
    return tuple(names), types, [_Part(None, partial(_gather, read))]


def _cells(path: Path, delimiter: str) -> Iterator[Row]:
    """The rows of a CSV file, all cells text, an empty one None."""
    with _reading(path), open(path, newline="", encoding="utf-8-sig") as file:
        reader = _csv_reader(file, delimiter)
        names: list[str] = next(reader, [])
        for cells in reader:
            if not cells:
                continue  # a blank line is no row
            if len(cells) != len(names):
                raise ValueError(
                    f"the row that ends at line {reader.line_num} has {len(cells)} fields, the "
                    f"first line {len(names)}"
                )
            yield {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _csv_reader(file: TextIO, delimiter: str) -> Any:
    csv.field_size_limit(CELL_BYTES)  # of the process; Python's own 128 KiB is less than a caption
    return csv.reader(file, delimiter=delimiter, strict=True)


def _lines(path: Path) -> Iterator[Row]:
    """The rows of a JSON lines file."""
    with _reading(path), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object {{...}}")
            yield row


def _open_parquet(path: Path) -> _Opened:
    with pq.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    parts = [
        _Part(metadata.row_group(group).num_rows, partial(_read_group, path, metadata, group))
        for group in range(metadata.num_row_groups)
    ]
    return *_columns(schema), parts


def _read_group(
    path: Path, metadata: Any, group: int, columns: Sequence[str] | None, rows: int
) -> Iterator[Piece]:
    # Buffered: a row group of images may be larger than the memory.
    with (
        _reading(path),
        pq.ParquetFile(path, metadata=metadata, buffer_size=1 << 20, pre_buffer=False) as file,
    ):
        yield from file.iter_batches(rows, [group], columns, use_threads=False)


def _open_arrow(path: Path) -> _Opened:
    """A file in Arrow's file format or, as `datasets` writes it, its stream format."""
    with pa.memory_map(str(path)) as file:
        try:
            schema = pa.ipc.open_file(file).schema
        except pa.ArrowInvalid:
            file.seek(0)
            schema = pa.ipc.open_stream(file).schema
    return *_columns(schema), [_Part(None, partial(_read_arrow, path))]


def _read_arrow(path: Path, columns: Sequence[str] | None, rows: int) -> Iterator[Piece]:
    with _reading(path):
        file = pa.memory_map(str(path))
        try:
            whole = pa.ipc.open_file(file)
            batches: Iterable[Any] = map(whole.get_batch, range(whole.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            batches = pa.ipc.open_stream(file)
        for batch in batches:
            yield batch if columns is None else batch.select(columns)


def _columns(schema: pa.Schema) -> tuple[tuple[str, ...], dict[str, pa.DataType]]:
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("a column's name comes twice")
    return tuple(schema.names), {field.name: field.type for field in schema}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong inside, as one line that names the file."""
    try:
        yield
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        what = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise GigabatchError(f"{path}: the table cannot be read: {what}.") from error
