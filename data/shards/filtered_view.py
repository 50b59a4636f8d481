"""`gigabatch data filter`: part of a set as a set of its own, without a copy of any shard."""

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
from gigabatch.data.shards.filter_expression import parse_where
from gigabatch.data.shards.index import FORMAT, I64, Index, read_manifest
from gigabatch.data.shards.index_files import is_unfinished, write_index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.json_columns import is_json


def count_where(index: Index, condition: str) -> int:
    """How many samples meet a condition."""
    return sum(len(rows) for rows in _matching(index, condition))


def make_view(index: Index, condition: str, out: Path) -> Index:
    """The samples of `index` that meet `condition`, as an index in the folder `out`.

    Raises GigabatchError for a condition that cannot be read or that nothing meets, and for a
    folder that holds anything but an older view.
    """
    old = read_manifest(out)
    if out.exists() and not ("view" in old or (out.is_dir() and _is_free(out))):
        raise GigabatchError(f"{out}: exists already and is not a view. Name another folder.")
    kept: I64 = np.concatenate([*_matching(index, condition), np.empty(0, np.int64)])
    if not len(kept):
        raise GigabatchError(f"{index.source}: no sample meets {condition!r}.")
    of_shard = np.searchsorted(index.first_sample, kept, side="right") - 1
    counts = np.bincount(of_shard, minlength=len(index.shards))
    shards = [
        {"name": _anywhere(s.name), "bytes": s.bytes, "version": s.version, "samples": n,
         "digest": s.digest}
        for s, n in zip(index.shards, counts.tolist(), strict=True)
    ]  # fmt: skip
    digest = hashlib.sha256(f"{index.digest}\n".encode() + kept.astype("<i8").tobytes())
    manifest = {
        "format": FORMAT,
        "settings": json.loads(index.settings.model_dump_json()),
        "shards": shards,
        "digest": digest.hexdigest(),
        "view": {"source": _anywhere(index.source), "where": condition},
    }
    try:
        write_index(_parts(index, kept), index.table.schema, manifest, out)
    except OSError as error:
        raise GigabatchError(f"{out}: the view cannot be written: {error}.") from error
    return open_index(out)


def _is_free(folder: Path) -> bool:
    return not any(folder.iterdir()) or is_unfinished(folder)


def _anywhere(name: str) -> str:
    """A path or URL that means the same in every folder."""
    return name if is_remote(name) else os.path.abspath(name)


def _matching(index: Index, condition: str) -> Iterator[I64]:
    """Numbers of the samples that meet a condition, a piece at a time."""
    schema = index.table.schema
    expression = parse_where(condition, schema.names, [f.name for f in schema if is_json(f)])
    first = 0
    for batch in index.table.to_batches():
        try:
            met = _truths(batch, expression)
        except pa.ArrowException as error:
            what = str(error).splitlines()[0]
            raise GigabatchError(f"{condition!r}: {what}. The columns are: "
                                 f"{_described(index)}.") from error  # fmt: skip
        yield np.flatnonzero(met) + first
        first += len(batch)


def _truths(batch: pa.RecordBatch, expression: pc.Expression) -> NDArray[np.bool_]:
    """[rows] whether each meets a condition; unknown is not."""
    source = acero.TableSourceNodeOptions(pa.Table.from_batches([batch]))
    nodes = [
        acero.Declaration("table_source", source),
        acero.Declaration("project", acero.ProjectNodeOptions([expression], ["met"])),
    ]
    met = acero.Declaration.from_sequence(nodes).to_table(use_threads=False)["met"]
    if not pa.types.is_boolean(met.type):
        raise pa.ArrowTypeError(f"it is of type {met.type}, and not true or false")
    # Bits to bytes. (`to_numpy` would import pandas, for seconds.)
    each = met.fill_null(False).combine_chunks().cast(pa.uint8())
    return np.frombuffer(each.buffers()[1], np.uint8, len(each), each.offset).view(bool)


def _described(index: Index) -> str:
    schema = index.table.schema
    return ", ".join(f"{field.name} ({field.type})" for field in schema if "." not in field.name)


def _parts(index: Index, kept: I64) -> Iterator[pa.Table]:
    step = 1 << 16
    for first in range(0, len(kept), step):
        yield index.table.take(pa.array(kept[first : first + step]))
