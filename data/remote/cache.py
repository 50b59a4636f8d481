"""Copies of remote shards, shared by all processes of a node, within a limit.

A copy is written as NAME.part under that file's own lock and renamed when whole, so a shard is
fetched once a node. The kernel frees the lock of a process that is killed; whoever has the lock
next starts over, so nothing stale remains. A part counts with its full size from the start. To
make room, the copies opened least recently are unlinked: who has one open keeps reading it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.ranges import Retry, ShardState, copy
from gigabatch.data.shards.index import cache_folder

log = logging.getLogger(__name__)
FETCHERS = 2
"""Threads of a process that fetch ahead."""
POLL_S = 0.05
"""How often to look whether others' downloads have left room."""
GIB = 1 << 30
_OURS = re.compile(r"[0-9a-f]{40}\.(tar|part)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def node_cache(gib: float = 64.0) -> ShardCache:
    """This node's cache, in $GIGABATCH_CACHE; one object a process for the same limit."""
    return _cache_at(cache_folder() / "shards", int(gib * GIB))


@lru_cache
def _cache_at(folder: Path, limit_bytes: int) -> ShardCache:
    return ShardCache(folder, limit_bytes)


class ShardCache:
    """Whole shards in `folder`, at most `limit_bytes` of them; it must lie on a local disk.

    Copies that were unlinked while open take space until they are closed, beyond the limit. Give
    it room for what all processes prefetch, or they drop each other's copies before use. Usable
    from several threads and after a fork; a pickle takes the settings along.
    """

    def __init__(self, folder: Path, limit_bytes: int, retry: Retry = Retry()) -> None:
        self.folder, self.limit_bytes, self.retry = Path(folder), limit_bytes, retry
        self._ahead: _Ahead | None = None

    def open(self, url: str, size: int, version: str) -> int:
        """A file descriptor, to be closed by the caller, of the whole copy; fetched if need be.

        Raises GigabatchError where the shard cannot be fetched, is no longer of this `size`
        (bytes) and `version`, or finds no room.
        """
        shard = ShardState(url, size, version)
        try:
            file = self._opened(shard)
            while file is None:  # again, should another process evict it before it is open
                self._fill(shard, wait=True)
                file = self._opened(shard)
        except OSError as error:
            raise GigabatchError(
                f"{self.folder}: the cache of remote shards cannot be used: {error}. It needs a "
                "folder on a local disk that can be written: set GIGABATCH_CACHE."
            ) from error
        return file

    def prefetch(self, url: str, size: int, version: str) -> None:
        """Begin to fetch a shard in the background. What goes wrong shows when it is opened."""
        if self._ahead is None or self._ahead.pid != os.getpid():  # threads end with a fork
            self._ahead = _Ahead(self)
        self._ahead.add(ShardState(url, size, version))

    def drop(self, url: str, size: int, version: str) -> None:
        """Remove the copy of a shard, so that the next `open` fetches it again."""
        self.path(ShardState(url, size, version)).unlink(missing_ok=True)

    def close(self) -> None:
        """Drop what is still to be prefetched. Copies stay, and the cache can be used on."""
        if self._ahead is not None and self._ahead.pid == os.getpid():
            self._ahead.close()
        self._ahead = None

    def path(self, shard: ShardState) -> Path:
        """Where the copy of a shard lies, if there is one."""
        name = hashlib.sha256(f"{shard.url}\n{shard.bytes}\n{shard.version}".encode()).hexdigest()
        return self.folder / f"{name[:40]}.tar"

    def _opened(self, shard: ShardState) -> int | None:
        """The copy, marked as just used; None where there is none of the right size."""
        path = self.path(shard)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        found = os.fstat(file).st_size
        if found == shard.bytes:
            now = time.time_ns()  # the kernel's own idea of now is too coarse to order by
            os.utime(file, ns=(now, now))
            return file
        os.close(file)
        log.warning(
            "%s: the copy has %d of %d bytes; it is fetched again", path, found, shard.bytes
        )
        path.unlink(missing_ok=True)
        return None

    def _fill(self, shard: ShardState, wait: bool) -> None:
        """Fetch a shard unless another process has just done so, or, without `wait`, is at it."""
        if shard.bytes > self.limit_bytes:
            raise GigabatchError(
                f"{shard.url}: its {shard.bytes / GIB:.2f} GiB do not fit into a cache of "
                f"{self.limit_bytes / GIB:.2f} GiB; set data.cache_gib higher."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(shard)
        half = path.with_suffix(".part")
        with _locked(half, wait) as part:
            if part is None:
                return
            try:
                found = _stat(path)
                if found and found.st_size == shard.bytes:
                    half.unlink()
                else:
                    self._write(part, shard)
                    # Locked: whoever counts files would else see neither the old name nor the new.
                    with _locked(self.folder / "lock"):
                        os.replace(half, path)
            except BaseException:
                half.unlink(missing_ok=True)
                raise

    def _write(self, part: FileIO, shard: ShardState) -> None:
        os.ftruncate(part.fileno(), 0)  # what a killed process left
        try:
            self._reserve(part, shard.bytes)
            copy(shard, part, self.retry)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            log.warning("%s: the disk is full; every copy is dropped: %s", self.folder, error)
            self._evict(room=-1)
            try:
                copy(shard, part, self.retry)
            except OSError as again:
                raise GigabatchError(
                    f"{self.folder}: no room for {shard.url} ({shard.bytes} bytes), even without "
                    f"the other copies: {again}. Free some space, or set GIGABATCH_CACHE."
                ) from again

    def _reserve(self, part: FileIO, size: int) -> None:
        """Make room, and take it by giving `part` its full size. Waits where other downloads hold
        the room: they become copies, which can go."""
        while True:
            with _locked(self.folder / "lock"):
                if self._evict(self.limit_bytes - size):
                    os.ftruncate(part.fileno(), size)
                    return
            time.sleep(POLL_S)

    def _evict(self, room: int) -> bool:
        """Unlink the least recently used copies until all files take at most `room` bytes, and
        parts whose process is gone. Whether that was enough."""
        total = 0
        copies: list[tuple[int, int, str]] = []
        with os.scandir(self.folder) as entries:
            names = [entry.name for entry in entries if _OURS.fullmatch(entry.name)]
        for name in names:
            path = self.folder / name
            if name.endswith(".part"):
                _drop_if_stale(path)
            status = _stat(path)
            if status is None:
                continue
            total += status.st_size
            if name.endswith(".tar"):
                copies.append((status.st_mtime_ns, status.st_size, name))
        for _, size, name in sorted(copies):
            if total <= room:
                break
            (self.folder / name).unlink(missing_ok=True)
            total -= size
        return total <= room

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None}


class _Ahead:
    """Daemon threads that fetch, which a process need not wait for when it ends."""

    def __init__(self, cache: ShardCache) -> None:
        self.pid = os.getpid()
        self.cache = cache
        self.shards: SimpleQueue[ShardState | None] = SimpleQueue()
        self.known: set[ShardState] = set()
        self.closed = False
        for _ in range(FETCHERS):
            Thread(target=self._run, name="shard prefetch", daemon=True).start()

    def add(self, shard: ShardState) -> None:
        if shard not in self.known:
            self.known.add(shard)
            self.shards.put(shard)

    def close(self) -> None:
        self.closed = True
        for _ in range(FETCHERS):
            self.shards.put(None)

    def _run(self) -> None:
        while (shard := self.shards.get()) is not None:
            try:
                if not self.closed:
                    self._fetch(shard)
            except (GigabatchError, OSError) as error:
                log.info("prefetching failed, and is left to who needs the shard: %s", error)
            finally:
                self.known.discard(shard)

    def _fetch(self, shard: ShardState) -> None:
        """A shard that another process is fetching is skipped, not waited for: so the processes
        of a node, which want the same shards, share the work."""
        file = self.cache._opened(shard)
        if file is None:
            self.cache._fill(shard, wait=False)
        else:
            os.close(file)


_held: set[FileIO] = set()
"""Locked files. A forked child closes its own, lest a lock outlive the process that took it."""


def _after_fork() -> None:
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[FileIO | None]:
    """The file at `path`, made if it is not there, open and locked against every other process and
    thread; None, without `wait`, where another has it."""
    while True:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
        _held.add(file)
        try:
            if not _lock(file, wait):
                yield None
                return
            if _is_at(path, file):  # else it was renamed or removed while we waited
                yield file
                return
        finally:
            _held.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)  # at once, even if a child still has the descriptor
            file.close()


def _lock(file: FileIO, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: FileIO) -> bool:
    found = _stat(path)
    return found is not None and os.path.samestat(found, os.fstat(file.fileno()))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _drop_if_stale(part: Path) -> None:
    """Remove a part that nobody has locked: its process is gone."""
    try:
        file = FileIO(str(part))
    except FileNotFoundError:
        return
    with file:
        if _lock(file, wait=False) and _is_at(part, file):
            part.unlink(missing_ok=True)
