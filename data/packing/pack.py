"""Pack a table or shards into WebDataset shards: atomic and resumable.

The content of a shard depends only on the source and the settings. A pack that was killed resumes
with the next shard and produces the same bytes as an uninterrupted one. It never overwrites files
of another pack.
"""

from __future__ import annotations

import logging
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
    SKIPPED,
    PackReport,
    State,
    append_skipped,
    locked,
    open_state,
    publish,
    save_state,
    shard_name,
    sync,
    temporary_file,
)
from gigabatch.data.packing.samples import Sample, Samples, ShardSamples, Skipped, TableSamples
from gigabatch.data.packing.splits import reject_splits
from gigabatch.data.packing.tables import SUFFIXES, open_table, table_files, unread_tables
from gigabatch.data.remote.locations import expand, is_remote
from gigabatch.data.shards.index import read_manifest
from gigabatch.data.shards.indexing import open_index

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
PROGRESS_EVERY = 100
"""Rows between calls of `progress`."""


class _Peekable:
    """An iterator whose next item can be inspected before it is taken."""

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
    """Write the shards `out/PREFIX-000000.tar`, `out/PREFIX-000001.tar` and so on.

    A table row becomes a sample of its file, its caption (`txt`) and its other columns (`json`).
    Samples of shards are copied unchanged. Finished shards of the same pack are kept.

    Args:
        source: A table (a file, or a folder or pattern of files of one format), or a folder or
            pattern of WebDataset shards.
        out: Output folder; created if needed.
        settings: Settings of the pack; None uses `PackSettings()`.
        progress: Called with the number of rows done and their total.

    Returns:
        Totals, including shards of earlier attempts.

    Raises:
        GigabatchError: if the source cannot be packed, or `out` belongs to another pack or cannot
            be written.
    """
    out = Path(os.path.abspath(out))
    samples = _open_source(source, settings or PackSettings())
    prefix = samples.settings.prefix or out.name
    if not re.fullmatch(PREFIX, prefix):
        raise GigabatchError(
            f"{out}: {prefix!r} is not a valid prefix of file names. Set --prefix to another name."
        )
    samples.settings = samples.settings.model_copy(update={"prefix": prefix})
    try:
        with locked(out):
            state = open_state(out, samples)
            if not state.complete:
                total = samples.check()
                if warning := samples.warning(out):
                    log.warning("%s", warning)
                if not total:
                    raise GigabatchError(f"{source}: there are no rows. Choose a source with rows.")
                save_state(out, state)
                _write_shards(out, state, samples, _throttle(progress, total))
            return state.report()
    except OSError as error:
        raise GigabatchError(
            f"{error.filename or out}: {error.strerror or error}. Fix this and rerun `gigabatch "
            "data pack`; finished shards are kept."
        ) from error


def _throttle(progress: Progress | None, total: int) -> Callable[[int], None]:
    def report(done: int) -> None:
        if progress and (done % PROGRESS_EVERY == 0 or done == total):
            progress(done, total)

    return report


def _open_source(source: str | Path, settings: PackSettings) -> Samples:
    path = Path(source)
    if is_remote(str(source)):
        if path.suffix.lower() in SUFFIXES:
            raise GigabatchError(
                f"{source}: tables must be on a local disk. Copy the table to this machine first."
            )
        return ShardSamples(open_index(str(source)), settings)
    if "view" in read_manifest(path):
        return ShardSamples(open_index(path), settings)
    is_folder = os.path.isdir(path)  # Path.is_dir would raise for a name that is too long.
    is_pattern = any(c in str(source) for c in "*?{[") and not os.path.exists(path)
    tables = table_files(path) if is_folder else []
    shards = sorted(path.glob("*.tar")) if is_folder else []
    if is_pattern:
        files = [Path(name) for name in expand([str(source)])]
        tables = [file for file in files if file.suffix.lower() in SUFFIXES]
        shards = [file for file in files if file not in set(tables)]
    if shards and tables:
        raise GigabatchError(
            f"{source}: contains both shards and tables ({tables[0].name}). Specify the table, or "
            f"the shards as {(path if is_folder else path.parent) / '*.tar'}."
        )
    if not settings.merge_splits:
        reject_splits(str(source), [str(file) for file in tables or shards])
    if is_folder and tables and (unread := unread_tables(path)):
        log.warning(
            "%s: not read: %s. Unpack or convert them to a table of the same format.",
            source, ", ".join(unread[:5]) + (", ..." if len(unread) > 5 else ""),
        )  # fmt: skip
    if shards or path.suffix == ".tar":
        return ShardSamples(open_index(str(source)), settings)
    samples = TableSamples(open_table(path, settings.delimiter), settings)
    log.info("%s: %s", source, samples.columns.describe())
    return samples


def _write_shards(out: Path, state: State, samples: Samples, report: Callable[[int], None]) -> None:
    items = _Peekable(samples.read(state.rows))
    while items.next is not None:
        name = shard_name(samples, len(state.shards))
        with temporary_file(out / name) as (path, file):
            shard = _fill_shard(
                file, items, samples.settings, lambda rows: report(state.rows + rows)
            )
            size = sync(file)
            append_skipped(out, state, shard.skipped)
            if shard.samples:
                publish(path, out / name)
                state.shards.append({"name": name, "samples": shard.samples, "bytes": size})
        state.rows += shard.samples + len(shard.skipped)
        save_state(out, state)
    if not state.shards:
        raise GigabatchError(
            f"{out}: every row was skipped, so there is no sample to pack. Check the folder and "
            f"the columns; {SKIPPED} lists the problems."
        )
    state.complete = True
    save_state(out, state)


@dataclass
class _Shard:
    samples: int = 0
    bytes: int = 0
    skipped: list[Skipped] = field(default_factory=list)


def _fill_shard(
    file: BinaryIO, items: _Peekable, settings: PackSettings, report: Callable[[int], None]
) -> _Shard:
    """Write samples until the shard is full; `report` receives the number of rows taken."""
    import webdataset as wds

    shard = _Shard()
    with wds.TarWriter(file, mtime=0, encoder=False) as writer:
        while (item := items.next) is not None:
            if isinstance(item, Skipped):
                shard.skipped.append(item)
            else:
                size = shard.bytes + _tar_bytes(item)
                if shard.samples == settings.per_shard or (
                    shard.samples and _file_size(size) > settings.shard_bytes
                ):
                    break
                writer.write(item)
                shard.samples += 1
                shard.bytes = size
            items.take()
            report(shard.samples + len(shard.skipped))
    return shard


def _tar_bytes(sample: Sample) -> int:
    """Compute the tar size of a sample's members: headers, and data padded to blocks."""
    size = 0
    for extension, data in sample.items():
        if extension != "__key__":
            size += BLOCKSIZE + _round_up(len(data), BLOCKSIZE)
            name = f"{sample['__key__']}.{extension}"
            if len(name) > 100 or not name.isascii():  # The name needs a pax header.
                size += BLOCKSIZE + _round_up(len(name.encode()) + len("123 path=\n"), BLOCKSIZE)
    return size


def _file_size(size: int) -> int:
    """Compute the size of a tar file from its members' size: add the end mark, pad to records."""
    return _round_up(size + 2 * BLOCKSIZE, RECORDSIZE)


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
