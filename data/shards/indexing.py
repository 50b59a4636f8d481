"""Opening the index of a set, built first where there is none, or brought up to date.

Shards are scanned by several processes at once. Each one's rows wait in a file of their own, so
that a scan cut off is taken up again and added shards cost no more than themselves; then all are
joined, the old ones first. Files are replaced one by one, the manifest last, and the Arrow file's
name carries its digest: a manifest never lies.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gigabatch.data.errors import GigabatchError
from gigabatch.data.files import replacing
from gigabatch.data.processes import ctrl_c_held, worker_pool
from gigabatch.data.remote.cache import ShardCache, node_cache
from gigabatch.data.remote.places import ShardState, expand, is_remote, stat_all
from gigabatch.data.shards.index import FORMAT, Index, cache_home, index_of, read_manifest
from gigabatch.data.shards.index_files import conform, joined_schema, write_index
from gigabatch.data.shards.pack_hint import pack_hint
from gigabatch.data.shards.scan import IndexSettings, scan

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
SHOWN = 10
"""Damaged shards that one error lists."""
ALONE = 64 << 20
"""Bytes of shards that one process scans; more are worth the start of others."""


@dataclass(frozen=True)
class _Job:
    """A shard to be scanned into the file `part`."""

    state: ShardState
    settings: IndexSettings
    part: Path
    cache: ShardCache | None


def open_index(
    source: str | Path,
    progress: Progress | None = None,
    settings: IndexSettings | None = None,
    *,
    columns: Sequence[str] = (),
    processes: int | None = None,
    cache: ShardCache | None = None,
) -> Index:
    """The index of a folder of `*.tar`, of a pattern, or of a view.

    `progress(done, total)` is called after each shard scanned. `settings`: what the index is to
    hold; None keeps what it has. `columns`: fields of the json member that it must hold besides.
    `cache`: where copies of remote shards go; None is this node's, with its usual room.
    Raises GigabatchError, which names shard and byte offset, for every damaged shard.
    """
    source = str(source)
    view = read_manifest(Path(source)) if not is_remote(source) else {}
    if "view" in view:
        return _open_view(source, view, columns)
    states = _states(source)
    home = home_of(source)
    manifest = read_manifest(home)
    inside = Path(source) / ".gigabatch"
    if home != inside and not is_remote(source):  # of a shared set that others keep
        theirs = read_manifest(inside)
        if theirs and _fresh(theirs, states, _wanted(theirs, settings, columns), source):
            home, manifest = inside, theirs
    wanted = _wanted(manifest, settings, columns)
    try:
        if not _fresh(manifest, states, wanted, source):
            with _lock(home):
                manifest = read_manifest(home)  # another process may have been first
                wanted = _wanted(manifest, settings, columns)
                if not _fresh(manifest, states, wanted, source):
                    states = _in_order(manifest, states, source)
                    jobs = [
                        _Job(s, wanted, home / "parts" / _part(s, wanted), cache) for s in states
                    ]
                    manifest = _build(jobs, manifest, home, source, progress, processes)
    except OSError as error:
        raise GigabatchError(f"{home}: the index cannot be written: {error}.") from error
    names = [_full(source, shard["name"]) for shard in manifest["shards"]]
    if not any(shard["samples"] for shard in manifest["shards"]):
        raise GigabatchError(f"{source}: the shards hold no samples. Name a filled set.")
    return index_of(source, home, manifest, names)


def stored_index(source: str) -> Index | None:
    """The index as it was written, whatever has become of the shards since; None where there is
    none."""
    view = read_manifest(Path(source)) if not is_remote(source) else {}
    homes = [Path(source)] if view else [Path(source) / ".gigabatch", home_of(source)]
    for home in homes:
        if manifest := read_manifest(home):
            names = [_full(source, shard["name"]) for shard in manifest["shards"]]
            return index_of(source, home, manifest, names)
    return None


def _states(source: str) -> list[ShardState]:
    path = Path(source)
    if os.path.isdir(source) and not any(path.glob("*.tar")):
        remedy = "Name a folder of shards (training: data.root and data.train; sets: eval.sets)."
        if any(path.parent.glob("*.tar")):
            remedy = f"{path.parent} holds shards itself: for those, data.train=. (a dot)."
        remedy = pack_hint(source) or remedy
        raise GigabatchError(f"{source}: holds no .tar shard. {remedy}")
    if not os.path.isdir(source) and (hint := pack_hint(source)):
        raise GigabatchError(f"{source}: {hint}")
    if (
        not is_remote(source)
        and not os.path.exists(source)
        and not any(mark in source for mark in "*?[{")
    ):
        raise GigabatchError(
            f"{source}: is not a folder. Name a folder of shards or a pattern (training: data.root "
            "and data.train; sets: eval.sets)."
        )
    return stat_all(expand([source]))


def _wanted(
    manifest: dict[str, Any], settings: IndexSettings | None, columns: Sequence[str]
) -> IndexSettings:
    if settings is None:
        settings = IndexSettings.model_validate(manifest.get("settings", {}))
    more = [name for name in columns if name not in settings.columns]
    return settings.model_copy(update={"columns": (*settings.columns, *more)})


def _fresh(
    manifest: dict[str, Any], states: Sequence[ShardState], wanted: IndexSettings, source: str
) -> bool:
    if not manifest or IndexSettings.model_validate(manifest["settings"]) != wanted:
        return False
    seen = {s["name"]: (s["bytes"], s["version"]) for s in manifest["shards"]}
    return seen == {_short(source, s.url): (s.bytes, s.version) for s in states}


def _in_order(
    manifest: dict[str, Any], states: Sequence[ShardState], source: str
) -> list[ShardState]:
    """Shards in the order of their first indexing; where some are gone, all afresh."""
    now = {_short(source, state.url): state for state in states}
    before = [shard["name"] for shard in manifest.get("shards", ())]
    if not before or not set(before) <= set(now):
        return list(states)
    added = [state for name, state in now.items() if name not in set(before)]
    return [now[name] for name in before] + added


def _short(source: str, url: str) -> str:
    """A shard's name in the manifest: inside a folder its file name, so that folders may move."""
    return os.path.basename(url) if os.path.isdir(source) else url


def _full(source: str, name: str) -> str:
    return str(Path(source) / name) if os.path.isdir(source) else name


def home_of(source: str) -> Path:
    """The folder of a source's index."""
    root = Path(source)
    # Mode bits are asked as well as the kernel, since root may write where nobody should.
    if os.path.isdir(source):  # a long pattern is no path, at which `Path.is_dir` would raise
        writable = os.access(root, os.W_OK) and root.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP)
        if writable:
            return root / ".gigabatch"
    where = source if is_remote(source) else str(root.resolve())
    name = hashlib.sha256(where.encode()).hexdigest()[:16]
    return cache_home() / "index" / f"{Path(source).name.strip('*.{}[]')[:64]}-{name}"


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One builder at a time; released by the system where the holder is killed."""
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process that writes %s", home)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: then each builds, to the same result
            log.warning("%s cannot be locked; other processes may index the same shards", home)
        yield


def _build(
    jobs: Sequence[_Job],
    manifest: dict[str, Any],
    home: Path,
    source: str,
    progress: Progress | None,
    processes: int | None,
) -> dict[str, Any]:
    """Scan what has no rows yet, join everything, publish."""
    (home / "parts").mkdir(exist_ok=True)
    known = _old_rows(manifest, home, jobs, source)
    todo = [job for job in jobs if job.state.url not in known and not job.part.exists()]
    done = len(jobs) - len(todo)
    log.info("indexing %d of %d shards of %s", len(todo), len(jobs), source)
    if progress and done and todo:
        progress(done, len(jobs))
    for message in _scan_all(todo, processes):
        done += 1
        if progress:
            progress(done, len(jobs))
        if message:
            known.setdefault("", []).append(message)
    if failures := known.pop("", []):
        raise GigabatchError(_listed(failures))
    return _publish(jobs, known, home, source)


def _listed(failures: list[str]) -> str:
    more = f"\n... and {len(failures) - SHOWN} more shards" if len(failures) > SHOWN else ""
    return "\n".join(sorted(failures)[:SHOWN]) + more


def _scan_all(jobs: Sequence[_Job], processes: int | None) -> Iterator[str | None]:
    """For each shard, in any order, what is wrong with it, or None."""
    if processes is None:
        processes = len(os.sched_getaffinity(0))
    if sum(job.state.bytes for job in jobs) < ALONE or processes == 1 or len(jobs) < 2:
        yield from map(_scan_one, jobs)
        return
    pool = worker_pool(min(processes, len(jobs)))
    try:
        with ctrl_c_held():
            futures = [pool.submit(_scan_one, job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise GigabatchError(
            "a process that indexed shards was killed, perhaps for want of memory; try again "
            "(shards already scanned are kept), with fewer --processes."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _scan_one(job: _Job) -> str | None:
    state = job.state
    try:
        file = _open(state, job.cache or node_cache())
        try:
            rows = scan(file, state.url, job.settings)
        finally:
            os.close(file)
        now = os.stat(state.url) if not is_remote(state.url) else None
        if now and (now.st_size, str(now.st_mtime_ns)) != (state.bytes, state.version):
            return f"{state.url}: the shard changed while it was indexed. Try again."
    except GigabatchError as error:
        return str(error)
    table = rows.table.replace_schema_metadata({"digest": rows.digest})
    with replacing(job.part) as fresh, pa.ipc.new_file(str(fresh), table.schema) as writer:
        writer.write_table(table)
    return None


def _open(state: ShardState, cache: ShardCache) -> int:
    if is_remote(state.url):
        return cache.open(state.url, state.bytes, state.version)
    try:
        return os.open(state.url, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise GigabatchError(
            f"{state.url}: the shard cannot be read: {error.strerror or error}. Make it readable, "
            "or remove it from the set."
        ) from error


def _part(state: ShardState, settings: IndexSettings) -> str:
    what = f"{FORMAT} {state} {settings.model_dump_json()}"
    return hashlib.sha256(what.encode()).hexdigest()[:32] + ".arrow"


def _old_rows(
    manifest: dict[str, Any], home: Path, jobs: Sequence[_Job], source: str
) -> dict[str, Any]:
    """Rows that the old index has already: URL -> (table, digest)."""
    if not manifest or manifest["settings"] != jobs[0].settings.model_dump(mode="json"):
        return {}
    index = index_of(source, home, manifest, [s["name"] for s in manifest["shards"]])
    now = {_short(source, job.state.url): job.state for job in jobs}
    rows = {}
    for number, shard in enumerate(index.shards):
        state = now.get(shard.name)
        if state and (state.bytes, state.version) == (shard.bytes, shard.version):
            part = index.table.slice(index.first_sample[number], shard.samples)
            rows[state.url] = (part, shard.digest)
    return rows


def _publish(
    jobs: Sequence[_Job], known: dict[str, Any], home: Path, source: str
) -> dict[str, Any]:
    def rows(job: _Job) -> tuple[pa.Table, str]:
        if job.state.url in known:
            return known[job.state.url]
        table = pa.ipc.open_file(pa.memory_map(str(job.part))).read_all()
        return table, table.schema.metadata[b"digest"].decode()

    schema = joined_schema(rows(job)[0].schema for job in jobs)
    shards = []
    digest = hashlib.sha256()
    for job in jobs:
        table, own = rows(job)
        name = _short(source, job.state.url)
        digest.update(f"{os.path.basename(name)} {own}\n".encode())
        shards.append({"name": name, "bytes": job.state.bytes, "version": job.state.version,
                       "samples": table.num_rows, "digest": own})  # fmt: skip
    manifest = {
        "format": FORMAT,
        "settings": jobs[0].settings.model_dump(mode="json"),
        "shards": shards,
        "digest": digest.hexdigest(),
    }
    write_index((conform(rows(job)[0], schema) for job in jobs), schema, manifest, home)
    shutil.rmtree(home / "parts", ignore_errors=True)
    return manifest


def _open_view(source: str, manifest: dict[str, Any], columns: Sequence[str]) -> Index:
    names = [shard["name"] for shard in manifest["shards"]]
    used = [shard for shard in manifest["shards"] if shard["samples"]]
    now = {s.url: (s.bytes, s.version) for s in stat_all([shard["name"] for shard in used])}
    for shard in used:
        if now[shard["name"]] != (shard["bytes"], shard["version"]):
            raise GigabatchError(
                f"{source}: {shard['name']} changed after this view was made. Make it again with "
                f"`gigabatch data filter {manifest['view']['source']} "
                f"'{manifest['view']['where']}' {source}`."
            )
    index = index_of(source, Path(source), manifest, names)
    if lacking := [name for name in columns if name not in index.columns]:
        raise GigabatchError(
            f"{source}: the view has no column {', '.join(lacking)}. Index the set that it was "
            f"made of with --columns {','.join(lacking)}, and make it again."
        )
    return index
