"""Local copies of remote shards, shared by all processes of a node, within a size limit.

A copy is written to NAME.part under a lock on that file and renamed when it is complete, so a node
fetches each shard once. The kernel frees the lock of a killed process; the next holder starts over.
A part counts with its full size from the start. To make room, the least recently opened copies are
unlinked; a process that has one open can still read it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.data.locks import locked, remove_unlocked
from gigabatch.data.remote.access import Retry, ShardState, copy
from gigabatch.data.shards.index import cache_folder

log = logging.getLogger(__name__)
FETCHERS = 2  # prefetch threads per process
POLL_S = 0.05  # between looks whether the downloads of others have left room
GIB = 1 << 30
_FILES = re.compile(r"[0-9a-f]{40}\.(tar|part)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def node_cache(gib: float = 64.0) -> ShardCache:
    """Return this node's cache in $GIGABATCH_CACHE; one object per process and limit."""
    return _cache_at(cache_folder() / "shards", int(gib * GIB))


@lru_cache
def _cache_at(folder: Path, limit_bytes: int) -> ShardCache:
    return ShardCache(folder, limit_bytes)


class ShardCache:
    """Complete shards in a folder on a local disk, at most `limit_bytes` of them.

    An unlinked copy takes space beyond the limit until it is closed. Leave room for what all
    processes prefetch, or they drop each other's copies before use. Usable from several threads and
    after a fork; a pickle carries the settings.
    """

    def __init__(self, folder: Path, limit_bytes: int, retry: Retry = Retry()) -> None:
        self.folder, self.limit_bytes, self.retry = Path(folder), limit_bytes, retry
        self._prefetcher: _Prefetcher | None = None

    def open(self, url: str, size: int, version: str) -> int:
        """Fetch a shard unless there is a copy; return a file descriptor, which the caller closes.

        Raises GigabatchError if the shard cannot be fetched, has another `size` (bytes) or
        `version`, or finds no room.
        """
        shard = ShardState(url, size, version)
        try:
            while (file := self._open_copy(shard)) is None:
                self._fill(shard, wait=True)  # again if another process evicts it before it is open
        except OSError as error:
            raise GigabatchError(
                f"{self.folder}: the cache of remote shards cannot be used: {error}. It needs a "
                "writable folder on a local disk: set GIGABATCH_CACHE."
            ) from error
        return file

    def prefetch(self, url: str, size: int, version: str) -> None:
        """Start to fetch a shard in the background. An error shows when the shard is opened."""
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():  # a fork has no threads
            self._prefetcher = _Prefetcher(self)
        self._prefetcher.add(ShardState(url, size, version))

    def drop(self, url: str, size: int, version: str) -> None:
        """Remove the copy of a shard, so that the next `open` fetches it again."""
        self.path(ShardState(url, size, version)).unlink(missing_ok=True)

    def close(self) -> None:
        """Drop what waits to be prefetched. Copies stay, and the cache remains usable."""
        if self._prefetcher is not None and self._prefetcher.pid == os.getpid():
            self._prefetcher.close()
        self._prefetcher = None

    def path(self, shard: ShardState) -> Path:
        """Return the path of a shard's copy, whether it exists or not."""
        name = hashlib.sha256(f"{shard.url}\n{shard.bytes}\n{shard.version}".encode()).hexdigest()
        return self.folder / f"{name[:40]}.tar"

    def _open_copy(self, shard: ShardState) -> int | None:
        """Open a copy and mark it as just used; None if there is none of the right size."""
        path = self.path(shard)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        size = os.fstat(file).st_size
        if size == shard.bytes:
            now = time.time_ns()  # the kernel's own clock is too coarse for an order
            os.utime(file, ns=(now, now))
            return file
        os.close(file)
        log.warning("%s: the copy has %d of %d bytes; fetching it again", path, size, shard.bytes)
        path.unlink(missing_ok=True)
        return None

    def _fill(self, shard: ShardState, wait: bool) -> None:
        """Fetch a shard unless there is a copy, or, without `wait`, another process fetches it."""
        if shard.bytes > self.limit_bytes:
            raise GigabatchError(
                f"{shard.url}: its {shard.bytes / GIB:.2f} GiB do not fit into a cache of "
                f"{self.limit_bytes / GIB:.2f} GiB; set data.cache_gib higher."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(shard)
        partial = path.with_suffix(".part")
        with self._lock_part(partial, wait) as file:
            if file is None:
                return
            try:
                status = _stat(path)
                if status and status.st_size == shard.bytes:
                    partial.unlink()
                else:
                    self._write(file, shard)
                    # Under the lock: who counts files would else see neither name.
                    with locked(self.folder / "lock"):
                        os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    @contextmanager
    def _lock_part(self, partial: Path, wait: bool) -> Iterator[FileIO | None]:
        """Lock a shard's part; yield None if, without `wait`, another process fetches the shard."""
        with ExitStack() as stack:
            if wait:
                file = stack.enter_context(locked(partial))
            else:
                # Eviction locks parts for a moment. Then the shard would seem to be fetched.
                with locked(self.folder / "lock"):
                    file = stack.enter_context(locked(partial, wait=False))
            yield file

    def _write(self, file: FileIO, shard: ShardState) -> None:
        os.ftruncate(file.fileno(), 0)  # what a killed process left
        try:
            self._reserve(file, shard.bytes)
            copy(shard, file, self.retry)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            log.warning("%s: the disk is full; dropping every copy: %s", self.folder, error)
            self._evict(room=-1)
            try:
                copy(shard, file, self.retry)
            except OSError as again:
                raise GigabatchError(
                    f"{self.folder}: no room for {shard.url} ({shard.bytes} bytes), even without "
                    f"the other copies: {again}. Free some space, or set GIGABATCH_CACHE."
                ) from again

    def _reserve(self, file: FileIO, size: int) -> None:
        """Make room and take it by giving `file` its full size; wait while downloads hold it."""
        while True:
            with locked(self.folder / "lock"):
                if self._evict(self.limit_bytes - size):
                    os.ftruncate(file.fileno(), size)
                    return
            time.sleep(POLL_S)

    def _evict(self, room: int) -> bool:
        """Unlink abandoned parts, and the least recently used copies until `room` bytes hold all
        files; return whether they do."""
        total = 0
        copies: list[tuple[int, int, Path]] = []
        with os.scandir(self.folder) as entries:
            paths = [Path(entry.path) for entry in entries if _FILES.fullmatch(entry.name)]
        for path in paths:
            if path.suffix == ".part":
                remove_unlocked(path)
            if (status := _stat(path)) is None:
                continue
            total += status.st_size
            if path.suffix == ".tar":
                copies.append((status.st_mtime_ns, status.st_size, path))
        for _, size, path in sorted(copies):
            if total <= room:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total <= room

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prefetcher": None}


class _Prefetcher:
    """Daemon threads that fetch shards; a process that ends does not wait for them."""

    def __init__(self, cache: ShardCache) -> None:
        self.pid = os.getpid()
        self.cache = cache
        self.queue: SimpleQueue[ShardState | None] = SimpleQueue()
        self.pending: set[ShardState] = set()
        self.closed = False
        for _ in range(FETCHERS):
            Thread(target=self._run, name="shard prefetch", daemon=True).start()

    def add(self, shard: ShardState) -> None:
        if shard not in self.pending:
            self.pending.add(shard)
            self.queue.put(shard)

    def close(self) -> None:
        self.closed = True
        for _ in range(FETCHERS):
            self.queue.put(None)

    def _run(self) -> None:
        while (shard := self.queue.get()) is not None:
            try:
                if not self.closed:
                    self._fetch(shard)
            except (GigabatchError, OSError) as error:
                log.info("prefetch failed; opening the shard will fetch it: %s", error)
            finally:
                self.pending.discard(shard)

    def _fetch(self, shard: ShardState) -> None:
        """Fetch a shard unless another process does: so the processes of a node share the work."""
        file = self.cache._open_copy(shard)
        if file is None:
            self.cache._fill(shard, wait=False)
        else:
            os.close(file)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
