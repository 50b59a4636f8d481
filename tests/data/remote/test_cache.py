from __future__ import annotations

import fcntl
import os
import pickle
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from caching import (
    FORK,
    LONG,
    QUICK,
    SIZE,
    cached_names,
    content,
    downloads,
    join,
    make_cache,
    partial_files,
    prefetch,
    prefetch_and_wait,
    read,
    read_all,
    start,
    wait_for,
)
from servers import FailingServer

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.access import ShardState
from gigabatch.data.remote.cache import GIB, ShardCache, node_cache
from gigabatch.data.remote.locations import stat_all


def test_shard_is_fetched_once_then_read_from_its_copy(
    web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    read_all(cache, states)
    request_count = len(web.requests)
    read_all(cache, states)
    read_all(make_cache(tmp_path), states)
    assert len(web.requests) == request_count
    assert downloads(web) == len(states)
    assert partial_files(cache) == []
    assert len(cached_names(cache)) == len(states)


def test_descriptor_is_read_only_and_not_inheritable(
    states: list[ShardState], tmp_path: Path
) -> None:
    file = make_cache(tmp_path).open(*vars(states[0]).values())
    assert not os.get_inheritable(file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(file, b"x")
    os.close(file)


def test_concurrent_processes_and_threads_share_one_download(
    web: FailingServer, states: list[ShardState], tmp_path: Path, children: list[BaseProcess]
) -> None:
    cache = make_cache(tmp_path)
    web.before(lambda: time.sleep(0.2), path="/s0.tar", times=2)  # gives all readers time to arrive
    barrier = FORK.Barrier(4)
    processes = [start(children, read_all, cache, states[:2], barrier) for _ in range(4)]
    threads = [threading.Thread(target=read_all, args=(cache, states[:2])) for _ in range(2)]
    for thread in threads:
        thread.start()
    join(*processes)
    for thread in threads:
        thread.join(20)
    assert [downloads(web, shard) for shard in states[:2]] == [1, 1]
    assert partial_files(cache) == []


def test_other_version_or_size_gets_a_separate_copy(
    web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    assert read(cache, states[0]) == content(states[0].url)
    (tmp_path / "remote" / "s0.tar").write_bytes(b"new" * 50)
    new = stat_all([states[0].url])[0]
    assert read(cache, new) == b"new" * 50
    with pytest.raises(GigabatchError, match="changed after it was indexed"):
        read(cache, ShardState(new.url, new.bytes, "other"))
    assert len(cached_names(cache)) == 2  # the failed download left no file


# Crashes


def test_waiting_process_takes_over_from_a_killed_download(
    web: FailingServer, states: list[ShardState], tmp_path: Path, children: list[BaseProcess]
) -> None:
    cache = make_cache(tmp_path, retry=LONG)
    web.stall(60, path="/s0.tar", skip=1, times=1)
    first = start(children, read_all, cache, states[:1])
    wait_for(lambda: downloads(web) == 1, "the first process sends its request")
    waiting = start(children, read_all, cache, states[:1])
    time.sleep(0.2)
    assert waiting.is_alive()
    assert downloads(web) == 1
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    join(waiting)
    assert downloads(web) == 2
    assert partial_files(cache) == []
    assert read(cache, states[0]) == content(states[0].url)


def _prefetch_and_fork(cache: ShardCache, shard: ShardState, pipe: Any) -> None:
    """Fork during a prefetch and send the child's process id."""
    prefetch(cache, shard)
    wait_for(
        lambda: partial_files(cache) and partial_files(cache)[0].stat().st_size,
        "the prefetch holds its lock",
    )
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    pipe.send(child)
    time.sleep(60)


def test_killed_process_releases_its_lock_while_its_child_lives(
    web: FailingServer, states: list[ShardState], tmp_path: Path, children: list[BaseProcess]
) -> None:
    cache = make_cache(tmp_path, retry=LONG)
    web.stall(60, path="/s0.tar", skip=1, times=1)
    receiver, sender = FORK.Pipe()
    first = start(children, _prefetch_and_fork, cache, states[0], sender)
    child = receiver.recv()
    try:
        wait_for(lambda: downloads(web) == 1, "the first process sends its request")
        first.kill()
        join(start(children, read_all, cache, states[:1]))
        os.kill(child, 0)  # the child is alive
    finally:
        os.kill(child, signal.SIGKILL)


def test_parts_of_killed_processes_are_removed_or_overwritten(
    states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path, shards=1)
    cache.folder.mkdir()
    for shard in states[:3]:
        cache.path(shard).with_suffix(".part").write_bytes(b"half" * (SIZE // 4))
    assert read(cache, states[0]) == content(states[0].url)
    assert cached_names(cache) == [cache.path(states[0]).name]


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_copy_of_wrong_size_is_fetched_again(
    size: int, web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    read(cache, states[0])
    os.truncate(cache.path(states[0]), size)
    assert read(cache, states[0]) == content(states[0].url)
    assert downloads(web) == 2


def test_failed_download_raises_and_leaves_no_file(
    web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    web.status(500, path="/s0.tar", skip=1)
    with pytest.raises(GigabatchError, match=r"s0\.tar: bytes 0 to 4000 could not be read in 3"):
        read(cache, states[0])
    assert cached_names(cache) == []
    web.clear_rules()
    assert read(cache, states[0]) == content(states[0].url)


# Capacity


def test_least_recently_opened_copies_are_evicted_first(
    states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path, shards=3)
    for number in (0, 1, 2, 0, 3):
        read(cache, states[number])
    assert cached_names(cache) == sorted(cache.path(states[i]).name for i in (2, 0, 3))
    read(cache, states[4])
    assert cached_names(cache) == sorted(cache.path(states[i]).name for i in (0, 3, 4))


def test_evicted_copy_stays_readable_while_open(states: list[ShardState], tmp_path: Path) -> None:
    cache = make_cache(tmp_path, shards=2)
    files = [cache.open(s.url, s.bytes, s.version) for s in states]
    assert len(cached_names(cache)) == 2
    for file, shard in zip(files, states, strict=True):
        assert os.pread(file, SIZE, 0) == content(shard.url)
        os.close(file)


def test_foreign_files_are_neither_counted_nor_removed(
    states: list[ShardState], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path, shards=1)
    cache.folder.mkdir()
    (cache.folder / "foreign.tar").write_bytes(bytes(9 * SIZE))
    for shard in states[:2]:
        assert read(cache, shard) == content(shard.url)
    assert cached_names(cache) == sorted([cache.path(states[1]).name, "foreign.tar"])


def test_shard_larger_than_the_cache_raises_with_the_config_key(
    web: FailingServer, states: list[ShardState], tmp_path: Path
) -> None:
    with pytest.raises(GigabatchError, match=r"s0\.tar: .*set data\.cache_gib higher") as error:
        read(make_cache(tmp_path, shards=0.9), states[0])
    assert "\n" not in str(error.value)
    assert web.requests == []


class _SizeMonitor:
    """Measures the folder repeatedly; `largest` is the largest total size in bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.largest, self.ended = folder, 0, threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.ended.is_set():
            with open(self.folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                sizes: dict[int, int] = {}  # by inode: a rename may show one file twice
                for path in self.folder.iterdir():
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        sizes[status.st_ino] = status.st_size
            self.largest = max(self.largest, sum(sizes.values()))
            time.sleep(0.001)

    def end(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.largest


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_many_processes_in_a_small_cache_stay_within_the_limit(
    capacity: int, states: list[ShardState], tmp_path: Path, children: list[BaseProcess]
) -> None:
    cache = make_cache(tmp_path, shards=capacity)
    cache.folder.mkdir()
    order = random.Random(capacity)
    barrier = FORK.Barrier(6)
    processes = [
        start(children, read_all, cache, order.sample(states * 4, 4 * len(states)), barrier)
        for _ in range(5)
    ]
    monitor = _SizeMonitor(cache.folder)  # after the forks, because it holds locks
    try:
        barrier.wait(20)
        join(*processes)
    finally:
        largest = monitor.end()
    assert 0 < largest <= capacity * SIZE
    assert partial_files(cache) == []


def test_download_waits_until_other_downloads_free_space(
    web: FailingServer, states: list[ShardState], tmp_path: Path, children: list[BaseProcess]
) -> None:
    cache = make_cache(tmp_path, shards=1)
    release = threading.Event()
    web.before(lambda: release.wait(20), path="/s0.tar", skip=1, times=1)
    first = start(children, read_all, cache, states[:1])
    wait_for(lambda: downloads(web) == 1, "the first process sends its request")
    second = start(children, read_all, cache, states[1:2])
    time.sleep(0.3)
    assert downloads(web, states[1]) == 0
    release.set()
    join(first, second)
    assert cached_names(cache) == [cache.path(states[1]).name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_evicts_all_copies_then_raises(
    small_disk: Path, web: FailingServer, states: list[ShardState]
) -> None:
    cache = ShardCache(small_disk / "cache", 10**9, QUICK)
    for shard in states[:3]:
        read(cache, shard)
    (small_disk / "ballast").write_bytes(bytes(20_480 - 4_096))  # files of other programs
    (small_disk / "more").write_bytes(bytes(4_096))
    for shard in (states[3], states[4], states[5]):
        assert read(cache, shard) == content(shard.url)
    assert cache.path(states[5]).name in cached_names(cache)
    assert cache.path(states[0]).name not in cached_names(cache)
    for name in cached_names(cache):
        (cache.folder / name).unlink()
    (small_disk / "more").write_bytes(bytes(16_384))  # no space remains
    with pytest.raises(GigabatchError, match=r"no room for .*No space left.*Free some space"):
        read(cache, states[0])
    assert cached_names(cache) == []
    assert downloads(web, states[0]) == 1 + 2  # a full disk does not cause a retry


def test_unusable_folder_raises_with_the_variable_to_set(
    states: list[ShardState], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = ShardCache(tmp_path / "file" / "cache", 10**9, QUICK)
    with pytest.raises(GigabatchError, match=r"file/cache: .*Not a directory.*GIGABATCH_CACHE"):
        read(cache, states[0])


def test_pickle_keeps_the_settings(states: list[ShardState], tmp_path: Path) -> None:
    cache = make_cache(tmp_path, shards=2)
    prefetch_and_wait(cache, states[:1])
    other = pickle.loads(pickle.dumps(cache))
    assert (other.folder, other.limit_bytes, other.retry) == (cache.folder, 2 * SIZE, QUICK)
    prefetch_and_wait(other, states[1:2])
    cache.close()
    other.close()


def test_node_cache_is_one_object_per_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GIGABATCH_CACHE", str(tmp_path))
    assert node_cache(0.5) is node_cache(0.5)
    assert node_cache(0.5).limit_bytes == GIB // 2
    assert node_cache(0.5).folder == tmp_path / "shards"
    assert node_cache().limit_bytes == 64 * GIB
