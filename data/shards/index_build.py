"""Build an index: scan shards with several processes, join their rows, and write them.

The rows of each scanned shard are stored in a file in `parts` until all are joined. This way, an
interrupted build resumes, and adding shards costs only the scan of the new ones.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gigabatch.data.errors import GigabatchError
from gigabatch.data.files import atomic_replace
from gigabatch.data.processes import ctrl_c_deferred, worker_pool
from gigabatch.data.remote.cache import ShardCache, node_cache
from gigabatch.data.remote.locations import ShardState, is_remote
from gigabatch.data.shards.index import FORMAT, index_from_manifest
from gigabatch.data.shards.index_files import conform_to_schema, merge_schemas, write_index
from gigabatch.data.shards.scan import IndexSettings, scan_shard

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
"""Called with (shards done, shards in total)."""
MAX_LISTED = 10
"""Maximum number of damaged shards that one error lists."""
FILES_OF_ROWS = 3
"""Files that hold the rows while an index is written: the part, the Arrow and the Parquet file."""
SINGLE_PROCESS_BYTES = 64 << 20
"""Total bytes of shards below which starting more processes takes longer than it saves."""

FULL = (errno.ENOSPC, errno.EDQUOT)

_Rows = tuple[pa.Table, str, int]  # rows of a shard, its digest, and members it does not use


@dataclass(frozen=True)
class ScanJob:
    """A shard to scan.

    Attributes:
        state: The shard's URL, size and version.
        settings: Content of its rows.
        part: File to write the rows to.
        cache: Cache of remote shards; None uses this node's cache.
    """

    state: ShardState
    settings: IndexSettings
    part: Path
    cache: ShardCache | None


def scan_jobs(
    states: Sequence[ShardState],
    settings: IndexSettings,
    folder: Path,
    cache: ShardCache | None,
) -> list[ScanJob]:
    """Return one job per shard, for an index in `folder`."""
    return [
        ScanJob(state, settings, folder / "parts" / _part_name(state, settings), cache)
        for state in states
    ]


def build_index(
    jobs: Sequence[ScanJob],
    manifest: dict[str, Any],
    folder: Path,
    source: str,
    progress: Progress | None,
    processes: int | None,
) -> dict[str, Any]:
    """Scan the shards without rows, join all rows, and write the index.

    Args:
        jobs: All shards of the set, in order.
        manifest: Manifest of the old index; {} if there is none.
        folder: Folder for the index files.
        source: The folder or pattern that is indexed.
        progress: Called after each shard.
        processes: Number of scanning processes; None uses one per core.

    Returns:
        The manifest of the new index.

    Raises:
        GigabatchError: if shards are damaged; the message lists them with byte offsets.
    """
    (folder / "parts").mkdir(exist_ok=True)
    old_rows = _old_rows(manifest, folder, jobs, source)
    todo = [job for job in jobs if job.state.url not in old_rows and not job.part.exists()]
    done = len(jobs) - len(todo)
    log.info("%s: indexing %d of %d shards", source, len(todo), len(jobs))
    if progress and done and todo:
        progress(done, len(jobs))
    failures = []
    try:
        for failure in _scan_all(todo, processes):
            done += 1
            if progress:
                progress(done, len(jobs))
            if failure:
                failures.append(failure)
    except _FullDiskError as error:
        raise _full_disk(folder, source, jobs, *error.args) from None
    if failures:
        more = len(failures) - MAX_LISTED
        lines = sorted(failures)[:MAX_LISTED] + [f"... and {more} more shards"] * (more > 0)
        raise GigabatchError("\n".join(lines))
    try:
        return _join_and_write(jobs, old_rows, folder, source)
    except _FullDiskError as error:
        raise _full_disk(folder, source, jobs, *error.args) from None


class _FullDiskError(Exception):
    """No room for rows; `args` are bytes of rows in memory, and bytes of the shards they are of."""


def _full_disk(
    folder: Path, source: str, jobs: Sequence[ScanJob], row_bytes: int, shard_bytes: int
) -> GigabatchError:
    """Return the error that names the space needed, estimated from the rows of some shards."""
    total = sum(job.state.bytes for job in jobs)
    needed = FILES_OF_ROWS * row_bytes * total / max(1, shard_bytes)
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    missing = max(needed - used, row_bytes)
    other = "set GIGABATCH_CACHE to a folder on another disk"
    if folder == Path(source) / ".gigabatch":
        other = f"store the index elsewhere: `chmod a-w {shlex.quote(source)}`, then {other}"
    return GigabatchError(
        f"{folder}: the disk is full. The index of {total / 1e6:,.1f} MB of shards needs about "
        f"{missing / 1e6:,.1f} MB more. Free this space, or {other}."
    )


def _scan_all(jobs: Sequence[ScanJob], processes: int | None) -> Iterator[str | None]:
    """Scan shards in any order; yield the problem of each, or None."""
    if processes is None:
        processes = len(os.sched_getaffinity(0))
    total = sum(job.state.bytes for job in jobs)
    if total < SINGLE_PROCESS_BYTES or processes == 1 or len(jobs) < 2:
        yield from map(_scan, jobs)
        return
    pool = worker_pool(min(processes, len(jobs)))
    try:
        with ctrl_c_deferred():
            futures = [pool.submit(_scan, job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise GigabatchError(
            "a process that indexed shards was killed, perhaps because memory ran out. Run the "
            "command again with fewer --processes; shards already scanned are kept."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _scan(job: ScanJob) -> str | None:
    """Scan one shard and write its rows; return its problem, or None."""
    state = job.state
    try:
        file = _open(state, job.cache or node_cache())
        try:
            rows = scan_shard(file, state.url, job.settings)
        finally:
            os.close(file)
        now = os.stat(state.url) if not is_remote(state.url) else None
        if now and (now.st_size, str(now.st_mtime_ns)) != (state.bytes, state.version):
            return f"{state.url}: the shard changed while it was indexed. Run the command again."
    except GigabatchError as error:
        return str(error)
    table = rows.table.replace_schema_metadata({"digest": rows.digest, "unused": str(rows.unused)})
    try:
        with atomic_replace(job.part) as path, pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    except OSError as error:
        if error.errno in FULL:
            raise _FullDiskError(table.nbytes, state.bytes) from error
        raise
    return None


def _open(state: ShardState, cache: ShardCache) -> int:
    """Return a descriptor of a shard, or of the local copy of a remote one."""
    if is_remote(state.url):
        return cache.open(state.url, state.bytes, state.version)
    try:
        return os.open(state.url, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise GigabatchError(
            f"{state.url}: the shard cannot be read: {error.strerror or error}. Make it readable, "
            "or remove it from the set."
        ) from error


def _part_name(state: ShardState, settings: IndexSettings) -> str:
    content = f"{FORMAT} {state} {settings.model_dump_json()}"
    return hashlib.sha256(content.encode()).hexdigest()[:32] + ".arrow"


def _old_rows(
    manifest: dict[str, Any], folder: Path, jobs: Sequence[ScanJob], source: str
) -> dict[str, _Rows]:
    """Return the rows of unchanged shards in the old index, by URL."""
    if not manifest or manifest["settings"] != jobs[0].settings.model_dump(mode="json"):
        return {}
    names = [shard["name"] for shard in manifest["shards"]]
    index = index_from_manifest(source, folder, manifest, names)
    states = {manifest_name(source, job.state.url): job.state for job in jobs}
    rows: dict[str, _Rows] = {}
    for number, shard in enumerate(index.shards):
        state = states.get(shard.name)
        if state and (state.bytes, state.version) == (shard.bytes, shard.version):
            table = index.table.slice(index.shard_starts[number], shard.samples)
            rows[state.url] = (table, shard.digest, manifest["shards"][number].get("unused", 0))
    return rows


def _join_and_write(
    jobs: Sequence[ScanJob], old_rows: dict[str, _Rows], folder: Path, source: str
) -> dict[str, Any]:
    """Join the rows of all shards, write the index, and return its manifest."""

    def rows(job: ScanJob) -> _Rows:
        if job.state.url in old_rows:
            return old_rows[job.state.url]
        table = pa.ipc.open_file(pa.memory_map(str(job.part))).read_all()
        metadata = table.schema.metadata
        return table, metadata[b"digest"].decode(), int(metadata.get(b"unused", b"0"))

    schema = merge_schemas(rows(job)[0].schema for job in jobs)
    shards = []
    digest = hashlib.sha256()
    for job in jobs:
        table, shard_digest, unused = rows(job)
        name = manifest_name(source, job.state.url)
        digest.update(f"{os.path.basename(name)} {shard_digest}\n".encode())
        shards.append({"name": name, "bytes": job.state.bytes, "version": job.state.version,
                       "samples": table.num_rows, "digest": shard_digest,
                       **({"unused": unused} if unused else {})})  # fmt: skip
    manifest = {
        "format": FORMAT,
        "settings": jobs[0].settings.model_dump(mode="json"),
        "shards": shards,
        "digest": digest.hexdigest(),
    }
    tables = (conform_to_schema(rows(job)[0], schema) for job in jobs)
    try:
        write_index(tables, schema, manifest, folder)
    except OSError as error:
        if error.errno in FULL:
            nbytes = sum(rows(job)[0].nbytes for job in jobs)
            raise _FullDiskError(nbytes, sum(job.state.bytes for job in jobs)) from error
        raise
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return manifest


def manifest_name(source: str, url: str) -> str:
    """Return a shard's name in the manifest: in a folder its file name, so that it can move."""
    return os.path.basename(url) if os.path.isdir(source) else url


def full_name(source: str, name: str) -> str:
    """Return the path or URL of a shard from its name in the manifest."""
    return str(Path(source) / name) if os.path.isdir(source) else name
