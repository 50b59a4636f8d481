"""Write the files of an index: the rows of all shards as Arrow and Parquet, and the manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gigabatch.data.files import atomic_replace, remove_stale_temporaries
from gigabatch.data.shards.index import ROWS
from gigabatch.data.shards.json_columns import MEMBER_SUFFIXES, cast_column, merge_fields

INDEX_FILES = ("samples-*.arrow", "samples.parquet", "manifest.json")


def merge_schemas(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Return the schema of all shards' columns: `key`, members by name, json fields."""
    merged: dict[str, pa.Field] = {}
    for schema in schemas:
        for field in schema:
            merged[field.name] = merge_fields(merged.get(field.name), field)
    members = sorted(name for name in merged if name.endswith(MEMBER_SUFFIXES))
    json_fields = [name for name in merged if name not in members and name != "key"]
    fields = [merged[name] for name in ("key", *members, *json_fields)]
    return pa.schema([f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in fields])


def conform_to_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a shard's rows with the columns of `schema`; absent members get offset 0."""
    columns = []
    for column in schema:
        if column.name in table.column_names:
            old_field = table.schema.field(column.name)
            columns.append(cast_column(table[column.name], old_field, column))
        elif column.name.endswith(MEMBER_SUFFIXES):
            zeros = np.zeros(table.num_rows, column.type.to_pandas_dtype())
            columns.append(pa.chunked_array([pa.array(zeros)]))
        else:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, column.type)]))
    return pa.table(columns, schema=schema)


def write_index(
    tables: Iterable[pa.Table], schema: pa.Schema, manifest: dict[str, Any], folder: Path
) -> None:
    """Write the files of an index, and remove what killed writers left in the folder.

    The manifest is written last, so it never describes incomplete files.

    Args:
        tables: Rows of all shards, in order.
        schema: Schema of every table.
        manifest: Contents of `manifest.json`; `arrow` and `members` are added here.
        folder: Folder for the files; created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in INDEX_FILES:
        remove_stale_temporaries(folder, name)
    content = f"{manifest['digest']} {manifest['settings']}"
    manifest["arrow"] = f"samples-{hashlib.sha256(content.encode()).hexdigest()[:16]}.arrow"
    extensions = [n.removesuffix(".offset") for n in schema.names if n.endswith(".offset")]
    member_counts = dict.fromkeys(extensions, 0)
    with (
        atomic_replace(folder / manifest["arrow"]) as arrow,
        atomic_replace(folder / "samples.parquet") as parquet,
        pa.ipc.new_file(str(arrow), schema) as arrow_writer,
        pq.ParquetWriter(parquet, schema) as parquet_writer,
    ):
        for batch in _record_batches(tables):
            for extension in extensions:
                offsets = _int64_array(batch[f"{extension}.offset"])
                member_counts[extension] += int(np.count_nonzero(offsets))
            arrow_writer.write_batch(batch.to_batches()[0])
            parquet_writer.write_table(batch)
    manifest["members"] = member_counts
    with atomic_replace(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))
    for old in folder.glob("samples-*.arrow"):
        if old.name != manifest["arrow"]:
            old.unlink(missing_ok=True)


def _int64_array(column: pa.ChunkedArray) -> Any:
    """Return a column of one chunk as int64 [rows], without a copy."""
    chunk = column.chunk(0)
    return np.frombuffer(chunk.buffers()[1], np.int64, len(chunk), 8 * chunk.offset)


def _record_batches(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Split and join tables into tables of one chunk of ROWS rows; the last one may be shorter."""
    pending: list[pa.Table] = []
    count = 0
    for table in tables:
        while count + table.num_rows >= ROWS:
            first = table.slice(0, ROWS - count)
            yield pa.concat_tables([*pending, first]).combine_chunks()
            pending, count, table = [], 0, table.slice(ROWS - count)
        if table.num_rows:
            pending.append(table)
            count += table.num_rows
    if count:
        yield pa.concat_tables(pending).combine_chunks()


def holds_only_partial_index(folder: Path) -> bool:
    """Return whether a folder contains only what a killed writer of an index left."""
    names = [path.name for path in folder.iterdir()]
    arrow = r"\.?samples-[0-9a-f]{16}\.arrow(\.\d+\.tmp)?"
    arrow_names = [name for name in names if re.fullmatch(arrow, name)]
    others = [name for name in names if name not in arrow_names]
    copies = r"samples\.parquet|\.(samples\.parquet|manifest\.json)\.\d+\.tmp"
    return bool(arrow_names) and all(re.fullmatch(copies, name) for name in others)
