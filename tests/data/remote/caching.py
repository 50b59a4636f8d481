"""A cache of shards that lie on a web server."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from servers import FailingServer

from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.remote.ranges import Retry, ShardState

SIZE = 4_000
NAMES = [f"s{i}.tar" for i in range(6)]
QUICK = Retry(attempts=3, first_wait_s=0.01, timeout_s=5)
PATIENT = Retry(attempts=3, first_wait_s=0.01, timeout_s=60)
FORK = multiprocessing.get_context("fork")


def content(url: str) -> bytes:
    return random.Random(url.rpartition("/")[2]).randbytes(SIZE)


def make(tmp_path: Path, shards: float = 100, retry: Retry = QUICK) -> ShardCache:
    """A cache that holds so many shards."""
    return ShardCache(tmp_path / "cache", int(shards * SIZE), retry)


def read(cache: ShardCache, shard: ShardState) -> bytes:
    file = cache.open(shard.url, shard.bytes, shard.version)
    try:
        return os.pread(file, shard.bytes + 1, 0)
    finally:
        os.close(file)


def prefetch(cache: ShardCache, *shards: ShardState) -> None:
    for shard in shards:
        cache.prefetch(shard.url, shard.bytes, shard.version)


def downloads(web: FailingServer, shard: ShardState | None = None) -> int:
    """Requests for a shard's bytes, not for its size."""
    path = "/" + shard.url.rpartition("/")[2] if shard else "*"
    return web.count(path=path, range=f"0-{SIZE - 1}")


def held(cache: ShardCache) -> list[str]:
    return sorted(p.name for p in cache.folder.iterdir() if p.name != "lock")


def parts(cache: ShardCache) -> list[Path]:
    return list(cache.folder.glob("*.part"))


def wait_for(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def no_threads() -> bool:
    return not any(thread.name == "shard prefetch" for thread in threading.enumerate())


def start(started: list[BaseProcess], target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = FORK.Process(target=target, args=arguments)
    started.append(process)
    process.start()
    return process


def join(*processes: BaseProcess) -> None:
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


def read_all(cache: ShardCache, shards: list[ShardState], begin: Any = None) -> None:
    """In a process: every shard, compared."""
    if begin:
        begin.wait()
    for shard in shards:
        assert read(cache, shard) == content(shard.url)


# One download


def prefetch_here(cache: ShardCache, shards: list[ShardState]) -> None:
    prefetch(cache, *shards)
    wait_for(lambda: all(cache.path(shard).exists() for shard in shards), "all are fetched")
