"""`gigabatch data pack`: a table, or shards, to webdataset shards, atomically and resumably.

What a shard holds is a function of the source and the settings. So a pack that was killed goes on
with the next shard, and ends with the same bytes as one that was not. Nothing is overwritten that
is not its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE
from typing import BinaryIO

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.columns import PREFIX, PackSettings
from gigabatch.data.packing.folder import (
    PackReport,
    State,
    alone,
    begin,
    note_skipped,
    publish,
    save,
    shard_name,
    sync,
    temporary,
)
from gigabatch.data.packing.samples import Sample, Samples, ShardSamples, Skipped, TableSamples
from gigabatch.data.packing.tables import SUFFIXES, open_table, table_files
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.shards.index import read_manifest
from gigabatch.data.shards.indexing import open_index

Progress = Callable[[int, int], None]
TOLD_EVERY = 100
"""Rows between calls of `progress`."""


class _Ahead:
    """An iterator whose next item can be seen before it is taken."""

    def __init__(self, items: Iterator[Sample | Skipped]) -> None:
        self._items = items
        self.next = next(items, None)

    def take(self) -> None:
        self.next = next(self._items, None)


def pack(
    source: str | Path,
    out: str | Path,
    settings: PackSettings | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Write the shards `out/PREFIX-000000.tar`, ... of `source`: a table (a file, or a folder of
    files of one kind), or a folder or pattern of webdataset shards.

    A table's row gives a sample of its file, its caption (`txt`) and its other columns (`json`);
    a sample of shards stays as it is. What is there already of the same pack is kept.
    `progress(done, total)` counts rows. Raises GigabatchError.
    """
    out = Path(os.path.abspath(out))
    samples = _open_source(source, settings or PackSettings())
    prefix = samples.settings.prefix or out.name
    if not re.fullmatch(PREFIX, prefix):
        raise GigabatchError(f"{out}: shards cannot be called {prefix!r}. Set prefix.")
    samples.settings = samples.settings.model_copy(update={"prefix": prefix})
    try:
        with alone(out):
            state = begin(out, samples)
            if not state.complete:
                total = samples.check()
                if not total:
                    raise GigabatchError(f"{source}: holds no row. Name a filled table.")
                save(out, state)
                _write(out, state, samples, _telling(progress, total))
            return state.report()
    except OSError as error:
        raise GigabatchError(
            f"{error.filename or out}: {error.strerror or error}. Put this right and pack again: "
            "shards that are finished are kept."
        ) from error


def _telling(progress: Progress | None, total: int) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if progress and (done % TOLD_EVERY == 0 or done == total):
            progress(done, total)

    return tell


def _open_source(source: str | Path, settings: PackSettings) -> Samples:
    path = Path(source)
    if is_remote(str(source)):
        if path.suffix.lower() in SUFFIXES:
            raise GigabatchError(
                f"{source}: tables are read from local disks alone. Copy it here first."
            )
        return ShardSamples(open_index(str(source)), settings)
    if "view" in read_manifest(path):
        return ShardSamples(open_index(path), settings)
    is_folder = os.path.isdir(path)  # which says no, where `Path` raises, of a name too long
    tables = table_files(path) if is_folder else []
    shards = is_folder and any(path.glob("*.tar"))
    if shards and tables:
        raise GigabatchError(
            f"{source}: holds both shards and tables ({tables[0].name}). Name the table itself, or "
            f"the pattern {path / '*.tar'}."
        )
    pattern = any(c in str(source) for c in "*?{[") and not os.path.exists(path)
    if shards or pattern or path.suffix == ".tar":
        return ShardSamples(open_index(str(source)), settings)
    return TableSamples(open_table(path), settings)


def _write(out: Path, state: State, samples: Samples, tell: Callable[[int], None]) -> None:
    items = _Ahead(samples.read(state.rows))
    while items.next is not None:
        name = shard_name(samples, len(state.shards))
        with temporary(out / name) as (path, file):
            shard = _fill(file, items, samples.settings, lambda rows: tell(state.rows + rows))
            size = sync(file)
            note_skipped(out, state, shard.skipped)
            if shard.samples:
                publish(path, out / name)
                state.shards.append({"name": name, "samples": shard.samples, "bytes": size})
        state.rows += shard.samples + len(shard.skipped)
        save(out, state)
    if not state.shards:
        raise GigabatchError(f"{out}: no sample was packed, since every row was skipped.")
    state.complete = True
    save(out, state)


@dataclass
class _Shard:
    samples: int = 0
    bytes: int = 0
    skipped: list[Skipped] = field(default_factory=list)


def _fill(
    file: BinaryIO, items: _Ahead, settings: PackSettings, tell: Callable[[int], None]
) -> _Shard:
    """Write samples until the shard is full."""
    import webdataset as wds

    shard = _Shard()
    with wds.TarWriter(file, mtime=0, encoder=False) as writer:
        while (item := items.next) is not None:
            if isinstance(item, Skipped):
                shard.skipped.append(item)
            else:
                size = shard.bytes + _tar_bytes(item)
                if shard.samples == settings.per_shard or (
                    shard.samples and _whole(size) > settings.shard_bytes
                ):
                    break
                writer.write(item)
                shard.samples += 1
                shard.bytes = size
            items.take()
            tell(shard.samples + len(shard.skipped))
    return shard


def _tar_bytes(sample: Sample) -> int:
    """Bytes of a sample's members in a tar, each behind its header and padded to blocks."""
    size = 0
    for extension, data in sample.items():
        if extension != "__key__":
            size += BLOCKSIZE + _up(len(data), BLOCKSIZE)
            name = f"{sample['__key__']}.{extension}"
            if len(name) > 100 or not name.isascii():  # then it has a header of its own
                size += BLOCKSIZE + _up(len(name.encode()) + len("123 path=\n"), BLOCKSIZE)
    return size


def _whole(size: int) -> int:
    """Bytes of a tar with its end mark, padded to records."""
    return _up(size + 2 * BLOCKSIZE, RECORDSIZE)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
