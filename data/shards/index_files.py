"""Rows of shards joined into the files of one index: Arrow, Parquet, manifest."""

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

from gigabatch.data.files import remove_left, replacing
from gigabatch.data.shards.index import ROWS
from gigabatch.data.shards.json_columns import MEMBER, cast, wider

FILES = ("samples-*.arrow", "samples.parquet", "manifest.json")
"""What an index consists of."""


def joined_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Every column of any shard: `key`, then members by name, then the lifted fields."""
    kinds: dict[str, pa.Field] = {}
    for schema in schemas:
        for field in schema:
            kinds[field.name] = wider(kinds.get(field.name), field)
    members = sorted(name for name in kinds if name.endswith(MEMBER))
    names = [name for name in kinds if name not in members and name != "key"]
    fields = [kinds[name] for name in ("key", *members, *names)]
    return pa.schema([f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in fields])


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with the columns of `schema`: members that it lacks at offset 0, fields null."""
    columns = []
    for column in schema:
        if column.name in table.column_names:
            columns.append(cast(table[column.name], table.schema.field(column.name), column))
        elif column.name.endswith(MEMBER):
            zeros = np.zeros(table.num_rows, column.type.to_pandas_dtype())
            columns.append(pa.chunked_array([pa.array(zeros)]))
        else:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, column.type)]))
    return pa.table(columns, schema=schema)


def write_index(
    tables: Iterable[pa.Table], schema: pa.Schema, manifest: dict[str, Any], home: Path
) -> None:
    """Write rows and manifest (completed here) into `home`, all or nothing. What writers that were
    killed have left there is removed."""
    home.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        remove_left(home, name)
    told = f"{manifest['digest']} {manifest['settings']}"
    manifest["arrow"] = f"samples-{hashlib.sha256(told.encode()).hexdigest()[:16]}.arrow"
    extensions = [n.removesuffix(".offset") for n in schema.names if n.endswith(".offset")]
    held = dict.fromkeys(extensions, 0)
    with (
        replacing(home / manifest["arrow"]) as arrow,
        replacing(home / "samples.parquet") as parquet,
        pa.ipc.new_file(str(arrow), schema) as rows,
        pq.ParquetWriter(parquet, schema) as copy,
    ):
        for batch in _batches(tables):
            for extension in extensions:
                held[extension] += int(np.count_nonzero(_plain(batch[f"{extension}.offset"])))
            rows.write_batch(batch.to_batches()[0])
            copy.write_table(batch)
    manifest["members"] = held
    with replacing(home / "manifest.json") as fresh:
        fresh.write_text(json.dumps(manifest, indent=1))
    for old in home.glob("samples-*.arrow"):
        if old.name != manifest["arrow"]:
            old.unlink(missing_ok=True)


def _plain(column: pa.ChunkedArray) -> Any:
    chunk = column.chunk(0)
    return np.frombuffer(chunk.buffers()[1], np.int64, len(chunk), 8 * chunk.offset)


def _batches(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables cut and joined to one chunk of ROWS rows each, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        while count + table.num_rows >= ROWS:
            first = table.slice(0, ROWS - count)
            yield pa.concat_tables([*held, first]).combine_chunks()
            held, count, table = [], 0, table.slice(ROWS - count)
        if table.num_rows:
            held.append(table)
            count += table.num_rows
    if count:
        yield pa.concat_tables(held).combine_chunks()


def is_unfinished(home: Path) -> bool:
    """Whether a folder holds nothing but what a writer of an index leaves that is killed."""
    names = [path.name for path in home.iterdir()]
    begun = [
        name for name in names if re.fullmatch(r"\.?samples-[0-9a-f]{16}\.arrow(\.\d+\.tmp)?", name)
    ]
    others = [name for name in names if name not in begun]
    copies = r"samples\.parquet|\.(samples\.parquet|manifest\.json)\.\d+\.tmp"
    return bool(begun) and all(re.fullmatch(copies, name) for name in others)
