"""Sources for `gigabatch data pack`, and readers of the shards that it writes."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tarfiles import contents

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.pack import PackSettings, pack

PNG, JPG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"
Rows = list[dict[str, Any]]


def album(folder: Path, count: int) -> Rows:
    """Write `count` files that start like images, and return table rows that name them."""
    random = np.random.default_rng(count)
    rows = []
    for i in range(count):
        name = f"im/{i % 3}/{i}.x.{('png', 'JPG')[i % 2]}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((PNG, JPG)[i % 2] + random.bytes(int(random.integers(1, 900))))
        rows.append({"file": name, "caption": f'a "thing",\nnumber {i}, Σ', "width": i % 7})
    return rows


def write_table(path: Path, rows: Rows) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), dialect="excel" + "-tab" * (path.suffix == ".tsv")
            )
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_arrow(path, pa.Table.from_pylist(rows))
    return path


def write_arrow(path: Path, table: pa.Table, rows: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        # `datasets` writes the stream format, other tools the file format, both as .arrow.
        new = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path


def embedded(folder: Path, rows: Rows) -> pa.Table:
    """Return the same rows with file contents in the table, as `datasets` stores images."""
    images = [
        {"bytes": (folder / row["file"]).read_bytes(), "path": Path(row["file"]).name}
        for row in rows
    ]
    fields = [{k: v for k, v in row.items() if k != "file"} for row in rows]
    return pa.Table.from_pylist(fields).append_column("image", pa.array(images))


def shard_files(folder: Path) -> dict[str, str]:
    """Return the digest of every file in a packed set, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def members(folder: Path) -> dict[str, bytes]:
    """Return the members of all shards, by name; no name may occur twice."""
    result: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        shard = contents(path)
        assert not set(shard) & set(result)
        result |= shard
    return result


def expected(folder: Path, rows: Rows) -> dict[str, bytes]:
    """Return the members that the rows of an `album` should become."""
    result = {}
    for i, row in enumerate(rows):
        kind = row["file"].rpartition(".")[2].lower()
        result[f"{i:06d}.{kind}"] = (folder / row["file"]).read_bytes()
        result[f"{i:06d}.txt"] = row["caption"].encode()
        fields = {k: v for k, v in row.items() if k not in ("file", "caption")}
        result[f"{i:06d}.json"] = json.dumps(fields, ensure_ascii=False).encode()
    return result


def pack_error(source: Path, out: Path, **settings: Any) -> str:
    """Pack, and return the message of the GigabatchError it must raise."""
    with pytest.raises(GigabatchError) as error:
        pack(source, out, PackSettings(**settings))
    message = str(error.value)
    assert "\n" not in message
    return message


def make_source(kind: str, folder: Path, count: int) -> Path:
    """Create a source of `count` samples: `files`, `parquet` or `arrow` (embedded), or `shards`."""
    rows = album(folder, count)
    if kind == "files":
        return write_table(folder / "t.csv", rows)
    if kind in ("parquet", "arrow"):
        return write_arrow(folder / f"t.{kind}", embedded(folder, rows))
    pack(write_table(folder / "t.csv", rows), folder / "in", PackSettings(per_shard=90))
    return folder / "in"


def run_in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process and return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def pack_until(source: Path, out: Path, settings: PackSettings, calls: int) -> None:
    """Pack in a process that kills itself after `calls` calls of `progress`."""
    remaining = iter(range(calls))

    def die(done: int, total: int) -> None:
        if next(remaining, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    code = run_in_child(lambda: pack(source, out, settings, die))
    assert code == -signal.SIGKILL
