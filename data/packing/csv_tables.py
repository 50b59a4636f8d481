"""Read CSV files, and find the character that separates their fields."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

CELL_BYTES = 64 << 20
"""Maximum size of a CSV cell; an unclosed quote would otherwise include the rest of the file."""
DELIMITERS = (",", "\t", ";", "|")
SNIFFED_ROWS = 50
"""Rows read to find the delimiter."""

Row = dict[str, Any]


def csv_header(path: Path, delimiter: str) -> list[str]:
    """Return the names of the columns.

    Raises:
        ValueError: if the first line does not name them.
        csv.Error: if it cannot be parsed.
    """
    with _open(path) as file:
        names: list[str] = next(_reader(file, delimiter), [])
    if not names or len(set(names)) < len(names) or "" in names:
        raise ValueError("the first line must name the columns, each with a different name")
    return names


def csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows; cells are text, empty ones None.

    Raises:
        ValueError: if a row has more or fewer fields than the first line.
        csv.Error: if a row cannot be parsed.
    """
    with _open(path) as file:
        reader = _reader(file, delimiter)
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


def find_delimiter(path: Path) -> str:
    """Return the character that separates the fields of a CSV file.

    It is the one of the file's suffix if the first lines fit it. It is another only if the first
    line names several columns with that one, each later line has as many, and no third one fits.
    """
    default = "\t" if path.suffix.lower() == ".tsv" else ","
    columns = {delimiter: _count_columns(path, delimiter) for delimiter in DELIMITERS}
    if columns[default] > 1:
        return default
    others = [delimiter for delimiter, count in columns.items() if count > 1]
    return others[0] if len(others) == 1 else default


def _count_columns(path: Path, delimiter: str) -> int:
    """Return the number of columns, 0 if the first lines do not agree with the first of them."""
    try:
        names = csv_header(path, delimiter)
        for _ in islice(csv_rows(path, delimiter), SNIFFED_ROWS):
            pass
    except (ValueError, csv.Error):
        return 0
    return len(names)


def _open(path: Path) -> TextIO:
    return open(path, newline="", encoding="utf-8-sig")


def _reader(file: TextIO, delimiter: str) -> Any:
    # Applies to the whole process; Python's default of 128 KiB is too small for long captions.
    csv.field_size_limit(CELL_BYTES)
    return csv.reader(file, delimiter=delimiter, strict=True)
