"""Helpers for tests of the shard cache with shards on a web server."""

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

from gigabatch.data.remote.access import Retry, ShardState
from gigabatch.data.remote.cache import ShardCache

SIZE = 4_000
NAMES = [f"s{i}.tar" for i in range(6)]
QUICK = Retry(attempts=3, first_wait_s=0.01, timeout_s=5)
LONG = Retry(attempts=3, first_wait_s=0.01, timeout_s=60)
FORK = multiprocessing.get_context("fork")


def content(url: str) -> bytes:
    return random.Random(url.rpartition("/")[2]).randbytes(SIZE)


def make_cache(tmp_path: Path, shards: float = 100, retry: Retry = QUICK) -> ShardCache:
    """Return a cache with room for `shards` shards."""
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
    """Count requests for a shard's bytes; exclude those for its size."""
    path = "/" + shard.url.rpartition("/")[2] if shard else "*"
    return web.count(path=path, range=f"0-{SIZE - 1}")


def cached_names(cache: ShardCache) -> list[str]:
    return sorted(p.name for p in cache.folder.iterdir() if p.name != "lock")


def partial_files(cache: ShardCache) -> list[Path]:
    return list(cache.folder.glob("*.part"))


def wait_for(condition: Callable[[], object], description: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"not in 60 s: {description}"
        time.sleep(0.005)


def prefetch_threads_ended() -> bool:
    return not any(thread.name == "shard prefetch" for thread in threading.enumerate())


def start(
    processes: list[BaseProcess], target: Callable[..., None], *arguments: Any
) -> BaseProcess:
    """Start a process and add it to `processes`."""
    process = FORK.Process(target=target, args=arguments)
    processes.append(process)
    process.start()
    return process


def join(*processes: BaseProcess) -> None:
    for process in processes:
        process.join(90)
        assert process.exitcode == 0


def read_all(cache: ShardCache, shards: list[ShardState], barrier: Any = None) -> None:
    """Read every shard and check its content; wait at the barrier first."""
    if barrier:
        barrier.wait()
    for shard in shards:
        assert read(cache, shard) == content(shard.url)


def prefetch_and_wait(cache: ShardCache, shards: list[ShardState]) -> None:
    prefetch(cache, *shards)
    wait_for(lambda: all(cache.path(shard).exists() for shard in shards), "all shards are fetched")
