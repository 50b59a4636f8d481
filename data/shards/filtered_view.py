"""Create filtered views (`gigabatch data filter`): subsets of a set that copy no shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import acero

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.shards.filter_expression import parse_filter
from gigabatch.data.shards.index import FORMAT, I64, Index, read_manifest
from gigabatch.data.shards.index_files import holds_only_partial_index, write_index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.json_columns import holds_json

_WRITE_ROWS = 1 << 16  # rows copied to a view at a time


def count_matches(index: Index, condition: str) -> int:
    """Count the samples that meet a condition.

    Raises:
        GigabatchError: if the condition is invalid.
    """
    return sum(len(rows) for rows in _matching_rows(index, condition))


def create_view(index: Index, condition: str, out: Path) -> Index:
    """Write the samples of `index` that meet a condition as a new set, and open it.

    Args:
        index: The set to filter; may be a view.
        condition: See `parse_filter`.
        out: A new or empty folder, or an older view, which is replaced.

    Raises:
        GigabatchError: if the condition is invalid, no sample meets it, or `out` contains anything
            other than a view.
    """
    old = read_manifest(out)
    if out.exists() and not ("view" in old or (out.is_dir() and _is_free(out))):
        raise GigabatchError(f"{out}: already exists and is not a view. Choose a different folder.")
    rows: I64 = np.concatenate([*_matching_rows(index, condition), np.empty(0, np.int64)])
    if not len(rows):
        raise GigabatchError(
            f"{index.source}: no sample meets {condition!r}. `gigabatch data stats "
            f"{index.source}` shows which values its fields have."
        )
    shard_of_row = np.searchsorted(index.shard_starts, rows, side="right") - 1
    counts = np.bincount(shard_of_row, minlength=len(index.shards))
    shards = [
        {"name": _absolute(s.name), "bytes": s.bytes, "version": s.version, "samples": n,
         "digest": s.digest}
        for s, n in zip(index.shards, counts.tolist(), strict=True)
    ]  # fmt: skip
    digest = hashlib.sha256(f"{index.digest}\n".encode() + rows.astype("<i8").tobytes())
    manifest = {
        "format": FORMAT,
        "settings": json.loads(index.settings.model_dump_json()),
        "shards": shards,
        "digest": digest.hexdigest(),
        "view": {"source": _absolute(index.source), "where": condition},
    }
    try:
        write_index(_tables(index, rows), index.table.schema, manifest, out)
    except OSError as error:
        raise GigabatchError(f"{out}: the view cannot be written: {error}.") from error
    return open_index(out)


def _is_free(folder: Path) -> bool:
    """Return whether a folder is empty or contains only what a killed writer left."""
    return not any(folder.iterdir()) or holds_only_partial_index(folder)


def _absolute(name: str) -> str:
    """Return a path or URL that means the same in every working folder."""
    return name if is_remote(name) else os.path.abspath(name)


def _matching_rows(index: Index, condition: str) -> Iterator[I64]:
    """Yield the rows of the samples that meet a condition, int64, one record batch at a time."""
    schema = index.table.schema
    of_type = {
        is_type: [f.name for f in schema if is_type(f.type) and not holds_json(f)]
        for is_type in (pa.types.is_floating, pa.types.is_string)
    }
    json_columns = [f.name for f in schema if holds_json(f)]
    expression = parse_filter(condition, schema.names, json_columns, *of_type.values())
    first = 0
    for batch in index.table.to_batches():
        try:
            matches = _evaluate(batch, expression)
        except pa.ArrowException as error:
            what = str(error).splitlines()[0]
            raise GigabatchError(f"{condition!r}: {what}. The columns are: "
                                 f"{_column_types(index)}.") from error  # fmt: skip
        yield np.flatnonzero(matches) + first
        first += len(batch)


def _evaluate(batch: pa.RecordBatch, expression: pc.Expression) -> NDArray[np.bool_]:
    """Return whether each row meets a condition, bool [rows]; null counts as false."""
    source = acero.TableSourceNodeOptions(pa.Table.from_batches([batch]))
    nodes = [
        acero.Declaration("table_source", source),
        acero.Declaration("project", acero.ProjectNodeOptions([expression], ["matches"])),
    ]
    matches = acero.Declaration.from_sequence(nodes).to_table(use_threads=False)["matches"]
    if not pa.types.is_boolean(matches.type):
        raise pa.ArrowTypeError(f"the condition has type {matches.type}; it must be true or false")
    # Convert bits to bytes. Not by `to_numpy`: it imports pandas, which takes seconds.
    array = matches.fill_null(False).combine_chunks().cast(pa.uint8())
    return np.frombuffer(array.buffers()[1], np.uint8, len(array), array.offset).view(bool)


def _column_types(index: Index) -> str:
    schema = index.table.schema
    return ", ".join(f"{field.name} ({field.type})" for field in schema if "." not in field.name)


def _tables(index: Index, rows: I64) -> Iterator[pa.Table]:
    for first in range(0, len(rows), _WRITE_ROWS):
        yield index.table.take(pa.array(rows[first : first + _WRITE_ROWS]))
