from __future__ import annotations

import subprocess
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from caching import (
    LONG,
    SIZE,
    cached_names,
    content,
    downloads,
    join,
    make_cache,
    partial_files,
    prefetch,
    prefetch_and_wait,
    prefetch_threads_ended,
    read,
    read_all,
    start,
    wait_for,
)
from servers import FailingServer

from gigabatch.data.errors import GigabatchError
from gigabatch.data.locks import locked
from gigabatch.data.remote import cache as cache_module
from gigabatch.data.remote.access import ShardState


def test_opening_prefetched_shards_needs_no_request(
    web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    prefetch(cache, *states, *states)
    wait_for(lambda: len(list(cache.folder.glob("*.tar"))) == len(states), "all shards are fetched")
    wait_for(lambda: not partial_files(cache), "all parts are renamed")
    request_count = len(web.requests)
    read_all(cache, states)
    assert len(web.requests) == request_count
    assert downloads(web) == len(states)
    cache.close()


def test_open_waits_for_the_prefetch_of_its_process(
    web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    web.before(lambda: time.sleep(0.3), path="/s0.tar", skip=1, times=1)
    prefetch(cache, states[0])
    wait_for(lambda: downloads(web) == 1, "the request arrives")
    assert read(cache, states[0]) == content(states[0].url)
    assert downloads(web) == 1
    cache.close()


def test_open_reports_the_error_of_a_failed_prefetch(
    web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    web.status(404, path="/s0.tar", times=2)
    prefetch(cache, states[0])
    wait_for(lambda: web.count(path="/s0.tar") == 1, "the request arrives")
    wait_for(lambda: not partial_files(cache), "the prefetch ends")
    with pytest.raises(GigabatchError, match="HTTP 404"):
        read(cache, states[0])
    assert read(cache, states[0]) == content(states[0].url)
    prefetch(cache, states[0], states[1])  # the threads survived the error
    wait_for(lambda: cache.path(states[1]).exists(), "the next shard is fetched")
    cache.close()


def test_pending_shard_is_not_queued_again(
    web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    release = threading.Event()
    for path in ("/s0.tar", "/s1.tar"):
        web.before(lambda: release.wait(20), path=path, times=1)
    (tmp_path / "remote" / "s2.tar").unlink()
    prefetch(cache, *states[:2], *states[2:3] * 5)
    wait_for(lambda: len(web.requests) == cache_module.FETCHERS, "both threads send a request")
    release.set()
    prefetch(cache, states[3])
    wait_for(lambda: cache.path(states[3]).exists(), "the last shard is fetched")
    cache.close()
    wait_for(prefetch_threads_ended, "the threads end")
    assert web.count(path="/s2.tar") == 1


def test_processes_share_the_work_of_prefetching(
    web: FailingServer, states: list[ShardState], tmp_path: Path, children: list[BaseProcess]
) -> None:
    cache = make_cache(tmp_path, retry=LONG)
    release = threading.Event()
    for path in ("/s0.tar", "/s1.tar"):
        web.before(lambda: release.wait(20), path=path, skip=1, times=1)
    first = start(children, read_all, cache, states[:1])
    second = start(children, read_all, cache, states[1:2])
    wait_for(lambda: downloads(web) == 2, "both send a request")
    prefetch(cache, *states)
    wait_for(lambda: len(list(cache.folder.glob("*.tar"))) == 4, "the other shards are fetched")
    release.set()
    join(first, second)
    assert downloads(web) == len(states)
    cache.close()


def test_close_drops_pending_shards_and_the_cache_remains_usable(
    web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    release = threading.Event()
    web.before(lambda: release.wait(20), times=cache_module.FETCHERS)
    prefetch(cache, *states)
    wait_for(lambda: len(web.requests) == cache_module.FETCHERS, "the first requests arrive")
    cache.close()
    release.set()
    wait_for(prefetch_threads_ended, "the threads end")
    assert downloads(web) == cache_module.FETCHERS
    prefetch(cache, states[-1])
    wait_for(lambda: cache.path(states[-1]).exists(), "the shard is fetched")
    cache.close()


PREFETCH_SCRIPT = """
import sys
from pathlib import Path
from gigabatch.data.remote.cache import ShardCache
url, size, folder = sys.argv[1:]
cache = ShardCache(Path(folder), 10**9)
cache.prefetch(url, int(size), "")
sys.stdin.readline()
"""


def test_process_ends_without_waiting_for_its_prefetch(
    web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    web.stall(60, path="/s0.tar", skip=1, times=1)
    cache = make_cache(tmp_path)
    script = [sys.executable, "-c", PREFETCH_SCRIPT, states[0].url, str(SIZE), str(cache.folder)]
    with subprocess.Popen(script, stdin=subprocess.PIPE) as process:
        try:
            wait_for(lambda: downloads(web) == 1, "the request arrives")
            process.communicate(b"\n", timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert len(partial_files(cache)) == 1
    read_all(cache, states[1:2])
    assert partial_files(cache) == []


def test_eviction_by_another_process_does_not_stop_prefetch(
    states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    cache.folder.mkdir()
    with locked(cache.folder / "lock"), locked(cache.path(states[0]).with_suffix(".part")):
        # An eviction holds these locks while it looks for abandoned parts.
        prefetch(cache, states[0])
        time.sleep(0.3)  # the prefetch thread tries to lock the part
    wait_for(lambda: cache.path(states[0]).exists(), "the shard is fetched")
    cache.close()


def test_forked_process_starts_its_own_prefetch(
    states: list[ShardState], tmp_path: Path, children: list[BaseProcess]
) -> None:
    cache = make_cache(tmp_path)
    prefetch_and_wait(cache, states[:2])
    join(*(start(children, prefetch_and_wait, cache, states[i : i + 2]) for i in (2, 4)))
    assert len(cached_names(cache)) == len(states)
    cache.close()
