"""The index of a folder of shards: one row a sample, built once, mapped into memory at run time.

`FOLDER/.gigabatch/` (or a cache folder, where FOLDER is read-only) holds `samples.parquet` for
interchange, `samples.arrow` (uncompressed, memory-mapped by every process) and `manifest.json`
(the shards with their sizes and times, and a digest of the rows). The sample number is the row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gigabatch.data.errors import GigabatchError
from gigabatch.data.tarwalk import walk

log = logging.getLogger(__name__)
FORMAT = 1
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Index:
    """A memory-mapped index. `root`: the folder of the shards. `shards`: their file names.

    `digest`: SHA-256 over the names, sizes and offsets of all members, the data's fingerprint.
    """

    root: Path
    folder: Path
    shards: tuple[str, ...]
    shard_sizes: tuple[int, ...]
    digest: str

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @cached_property
    def table(self) -> pa.Table:
        return _map_table(self.folder)

    @cached_property
    def first_sample(self) -> NDArray[np.int64]:
        """[shards + 1] the sample number at which each shard starts."""
        return np.concatenate([[0], np.cumsum(self.shard_sizes)])

    @property
    def members(self) -> tuple[str, ...]:
        """The extensions found, such as ("json", "png", "txt")."""
        names = self.table.column_names
        return tuple(n.removesuffix(".offset") for n in names if n.endswith(".offset"))

    def key(self, sample: int) -> str:
        return self.table["key"][sample].as_py()

    def shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self.first_sample, sample, side="right")) - 1

    def column(self, name: str) -> NDArray[np.int64]:
        """A numeric column, such as `png.offset`, without a copy.

        (pyarrow's own `to_numpy` imports pandas, for seconds, and swallows a Ctrl-C meanwhile.)
        """
        if name not in self._columns:
            parts = [np.frombuffer(c.buffers()[1], np.int64, len(c), 8 * c.offset)
                     for c in self.table[name].chunks]  # fmt: skip
            self._columns[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, NDArray[np.int64]]:
        return {}

    def span(self, sample: int, member: str) -> tuple[int, int]:
        """(offset, size) of one member in its shard, in bytes; offset 0 means it is missing."""
        offset, size = self.column(f"{member}.offset"), self.column(f"{member}.size")
        return int(offset[sample]), int(size[sample])

    def require(self, *choices: str) -> str:
        """The first of `choices` (extensions) that every sample has."""
        for member in choices:
            if member in self.members:
                missing = np.flatnonzero(self.column(f"{member}.offset") == 0)
                if missing.size == 0:
                    return member
                sample = int(missing[0])
                raise GigabatchError(
                    f"{self.root / self.shards[self.shard_of(sample)]}: sample "
                    f"{self.key(sample)!r} has no .{member} member ({missing.size} of {len(self)} "
                    "samples lack one). Write the shards again with every member present."
                )
        raise GigabatchError(
            f"{self.root}: no sample has a .{' or .'.join(choices)} member; found: "
            f"{', '.join('.' + m for m in self.members)}. Is data.train the folder you meant?"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description, not the mapped table: each process maps it itself."""
        mapped = ("table", "first_sample", "_columns")
        return {k: v for k, v in self.__dict__.items() if k not in mapped}


def open_index(root: Path, progress: Progress | None = None) -> Index:
    """The index of the shards in `root` (`*.tar`), built first if there is none or it is stale.

    `progress(done, total)` is called after each shard scanned.
    """
    shards = sorted(p.name for p in root.glob("*.tar")) if root.is_dir() else []
    if not shards:
        why = "holds no .tar shard" if root.is_dir() else "is not a folder"
        remedy = "Name a folder of shards (training: data.root and data.train; sets: eval.sets)."
        if any(root.parent.glob("*.tar")):
            remedy = f"{root.parent} holds shards itself: for those, data.train=. (a dot)."
        raise GigabatchError(f"{root}: {why}. {remedy}")
    home = _index_folder(root)
    manifest = _read_manifest(home)
    try:
        seen = [_state(root / name) for name in shards]
        if manifest.get("shards") != seen:
            manifest = _build(root, shards, seen, home, progress)
    except OSError as error:
        raise GigabatchError(
            f"{error.filename or root}: the shard cannot be read: {error.strerror or error}. Make "
            "it readable, or remove it from the folder."
        ) from error
    if not manifest["rows"]:
        raise GigabatchError(f"{root}: the shards hold no samples. Set data.root to a filled set.")
    return Index(root, home, tuple(shards), tuple(manifest["shard_sizes"]), manifest["digest"])


def _state(path: Path) -> dict[str, Any]:
    info = path.stat()
    return {"name": path.name, "bytes": info.st_size, "mtime_ns": info.st_mtime_ns}


def _index_folder(root: Path) -> Path:
    # Mode bits are asked as well as the kernel, since root may write where nobody should.
    writable = os.access(root, os.W_OK) and root.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP)
    if writable:
        return root / ".gigabatch"
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return cache_home() / "index" / f"{root.name}-{name}"


def cache_home() -> Path:
    """$GIGABATCH_CACHE, or `gigabatch` in $XDG_CACHE_HOME, or in ~/.cache."""
    if own := os.environ.get("GIGABATCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gigabatch"


def _read_manifest(home: Path) -> dict[str, Any]:
    """The manifest of a whole index; empty where there is none, or part of one is missing."""
    try:
        manifest = json.loads((home / "manifest.json").read_text())
        whole = manifest["format"] == FORMAT and manifest["rows"] == _map_table(home).num_rows
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowInvalid):
        return {}
    return manifest if whole else {}


def _map_table(home: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(home / "samples.arrow"))).read_all()


def _build(
    root: Path, shards: list[str], seen: list[dict[str, Any]], home: Path, progress: Progress | None
) -> dict[str, Any]:
    log.info("indexing %d shards in %s", len(shards), root)
    rows: list[dict[str, Any]] = []
    sizes = []
    for number, name in enumerate(shards):
        before = len(rows)
        rows.extend(_samples(root / name, number))
        sizes.append(len(rows) - before)
        if progress:
            progress(number + 1, len(shards))
    table = _table(rows)
    digest = hashlib.sha256()
    for name in table.column_names:
        digest.update(f"{name}\n".encode())
        for value in table[name].to_pylist():
            digest.update(f"{value}\n".encode())
    manifest = {
        "format": FORMAT,
        "shards": seen,
        "shard_sizes": sizes,
        "rows": len(rows),
        "digest": digest.hexdigest(),
    }
    _publish(table, manifest, home)
    return manifest


def _samples(path: Path, shard: int) -> Iterator[dict[str, Any]]:
    """Group consecutive members by key (webdataset's rule: the name up to the first dot)."""
    row: dict[str, Any] = {}
    done: set[str] = set()
    for member in walk(path):
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        extension = extension.lower()  # as webdataset does
        if not dot or not stem:
            continue  # webdataset skips names without an extension, and hidden files
        key = f"{folder}/{stem}" if folder else stem
        if row and row["key"] != key:
            done.add(row["key"])
            yield row
            row = {}
        if key in done or f"{extension}.offset" in row:
            raise GigabatchError(
                f"{path}: at byte {member.offset}: key {key!r} comes a second time "
                f"(member {member.name!r}). Members of a sample must be adjacent and unique; "
                "a dot inside the key is a common cause. Write the shard again."
            )
        row.update(key=key, shard=shard)
        row[f"{extension}.offset"], row[f"{extension}.size"] = member.offset, member.size
    if row:
        yield row


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    extensions = sorted({name.rpartition(".")[0] for row in rows for name in row if "." in name})
    columns: dict[str, pa.Array] = {
        "key": pa.array([row["key"] for row in rows], pa.large_string()),
        "shard": pa.array([row["shard"] for row in rows], pa.int32()),
    }
    for extension in extensions:
        for what in ("offset", "size"):
            name = f"{extension}.{what}"
            columns[name] = pa.array([row.get(name, 0) for row in rows], pa.int64())
    return pa.table(columns)


def _publish(table: pa.Table, manifest: dict[str, Any], home: Path) -> None:
    """Replace file by file, the manifest last, so that a manifest never lies.

    Processes that index the same shards at once replace each other's files by equal ones.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as name:
            fresh = Path(name)
            pq.write_table(table, fresh / "samples.parquet")
            with pa.ipc.new_file(fresh / "samples.arrow", table.schema) as writer:
                writer.write_table(table)
            (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1))
            (home / "manifest.json").unlink(missing_ok=True)
            for file in ("samples.parquet", "samples.arrow", "manifest.json"):
                os.replace(fresh / file, home / file)
    except OSError as error:
        raise GigabatchError(f"{home}: the index cannot be written: {error}.") from error
