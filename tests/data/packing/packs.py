"""Sources for `gigabatch data pack`, and what is found in the shards that it writes."""

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
    """`count` files that begin as images do, and the rows of a table of them."""
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
        # `datasets` writes the stream format, others the file format, both as .arrow.
        new = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path


def embedded(folder: Path, rows: Rows) -> pa.Table:
    """The same rows with their bytes in the table, as `datasets` keeps images."""
    images = [
        {"bytes": (folder / row["file"]).read_bytes(), "path": Path(row["file"]).name}
        for row in rows
    ]
    rest = [{k: v for k, v in row.items() if k != "file"} for row in rows]
    return pa.Table.from_pylist(rest).append_column("image", pa.array(images))


def shard_files(folder: Path) -> dict[str, str]:
    """Every file of a packed set, by its digest."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def members(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        one = contents(path)
        assert not set(one) & set(found)
        found |= one
    return found


def expected(folder: Path, rows: Rows) -> dict[str, bytes]:
    found = {}
    for i, row in enumerate(rows):
        kind = row["file"].rpartition(".")[2].lower()
        found[f"{i:06d}.{kind}"] = (folder / row["file"]).read_bytes()
        found[f"{i:06d}.txt"] = row["caption"].encode()
        rest = {k: v for k, v in row.items() if k not in ("file", "caption")}
        found[f"{i:06d}.json"] = json.dumps(rest, ensure_ascii=False).encode()
    return found


def refusal(source: Path, out: Path, **settings: Any) -> str:
    with pytest.raises(GigabatchError) as caught:
        pack(source, out, PackSettings(**settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


def make(kind: str, folder: Path, count: int) -> Path:
    """A source of `count` samples: a table and files, one that holds bytes, or shards."""
    rows = album(folder, count)
    if kind == "files":
        return write_table(folder / "t.csv", rows)
    if kind in ("parquet", "arrow"):
        return write_arrow(folder / f"t.{kind}", embedded(folder, rows))
    pack(write_table(folder / "t.csv", rows), folder / "in", PackSettings(per_shard=90))
    return folder / "in"


def in_child(work: Callable[[], object]) -> int:
    """The exit code of a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def pack_until(source: Path, out: Path, settings: PackSettings, calls: int) -> None:
    """Pack, and be killed at the given call of `progress`."""
    left = iter(range(calls))

    def die(done: int, total: int) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    code = in_child(lambda: pack(source, out, settings, die))
    assert code == -signal.SIGKILL
