from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from servers import FailingServer, web_server

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote import cache as cache_module
from gigabatch.data.remote.cache import GIB, ShardCache, node_cache
from gigabatch.data.remote.places import stat_all
from gigabatch.data.remote.ranges import Retry, ShardState

SIZE = 4_000
NAMES = [f"s{i}.tar" for i in range(6)]
QUICK = Retry(attempts=3, first_wait_s=0.01, timeout_s=5)
PATIENT = Retry(attempts=3, first_wait_s=0.01, timeout_s=60)
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FailingServer]:
    folder = tmp_path / "far"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(content(name))
    with web_server(folder) as server:
        yield server


@pytest.fixture
def shards(web: FailingServer) -> list[ShardState]:
    found = stat_all([f"{web.url}/{name}" for name in NAMES])
    web.requests.clear()
    return found


@pytest.fixture
def started() -> Iterator[list[BaseProcess]]:
    """Processes that are killed if they outlive the test."""
    processes: list[BaseProcess] = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


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


def test_a_shard_is_fetched_once_and_then_read_from_its_copy(
    web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path)
    read_all(cache, shards)
    asked = len(web.requests)
    read_all(cache, shards)
    read_all(make(tmp_path), shards)
    assert len(web.requests) == asked
    assert downloads(web) == len(shards)
    assert parts(cache) == []
    assert len(held(cache)) == len(shards)


def test_a_descriptor_is_read_only_and_does_not_leak_into_programs(
    shards: list[ShardState], tmp_path: Path
) -> None:
    file = make(tmp_path).open(*vars(shards[0]).values())
    assert not os.get_inheritable(file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(file, b"x")
    os.close(file)


def test_processes_and_threads_that_open_a_shard_at_once_share_one_download(
    web: FailingServer, shards: list[ShardState], tmp_path: Path, started: list[BaseProcess]
) -> None:
    cache = make(tmp_path)
    web.before(lambda: time.sleep(0.2), path="/s0.tar", times=2)  # lets all of them come
    begin = FORK.Barrier(4)
    processes = [start(started, read_all, cache, shards[:2], begin) for _ in range(4)]
    threads = [threading.Thread(target=read_all, args=(cache, shards[:2])) for _ in range(2)]
    for thread in threads:
        thread.start()
    join(*processes)
    for thread in threads:
        thread.join(20)
    assert [downloads(web, shard) for shard in shards[:2]] == [1, 1]
    assert parts(cache) == []


def test_another_version_or_size_is_another_copy(
    web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path)
    assert read(cache, shards[0]) == content(shards[0].url)
    (tmp_path / "far" / "s0.tar").write_bytes(b"new" * 50)
    new = stat_all([shards[0].url])[0]
    assert read(cache, new) == b"new" * 50
    with pytest.raises(GigabatchError, match="changed after it was indexed"):
        read(cache, ShardState(new.url, new.bytes, "other"))
    assert len(held(cache)) == 2  # the failed one left nothing


# Crashes


def test_a_process_killed_in_its_download_is_replaced_by_one_that_waits(
    web: FailingServer, shards: list[ShardState], tmp_path: Path, started: list[BaseProcess]
) -> None:
    cache = make(tmp_path, retry=PATIENT)
    web.stall(60, path="/s0.tar", skip=1, times=1)
    first = start(started, read_all, cache, shards[:1])
    wait_for(lambda: downloads(web) == 1, "the first process asked")
    waiting = start(started, read_all, cache, shards[:1])
    time.sleep(0.2)
    assert waiting.is_alive()
    assert downloads(web) == 1
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    join(waiting)
    assert downloads(web) == 2
    assert parts(cache) == []
    assert read(cache, shards[0]) == content(shards[0].url)


def _prefetch_and_fork(cache: ShardCache, shard: ShardState, pipe: Any) -> None:
    prefetch(cache, shard)
    wait_for(lambda: parts(cache) and parts(cache)[0].stat().st_size, "it is locked")
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    pipe.send(child)
    time.sleep(60)


def test_a_lock_does_not_live_on_in_a_child_of_the_process_that_was_killed(
    web: FailingServer, shards: list[ShardState], tmp_path: Path, started: list[BaseProcess]
) -> None:
    cache = make(tmp_path, retry=PATIENT)
    web.stall(60, path="/s0.tar", skip=1, times=1)
    here, there = FORK.Pipe()
    first = start(started, _prefetch_and_fork, cache, shards[0], there)
    child = here.recv()
    try:
        wait_for(lambda: downloads(web) == 1, "the first process asked")
        first.kill()
        join(start(started, read_all, cache, shards[:1]))
        os.kill(child, 0)  # it still lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_or_written_anew(
    shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path, shards=1)
    cache.folder.mkdir()
    for shard in shards[:3]:
        cache.path(shard).with_suffix(".part").write_bytes(b"half" * (SIZE // 4))
    assert read(cache, shards[0]) == content(shards[0].url)
    assert held(cache) == [cache.path(shards[0]).name]


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_a_copy_of_the_wrong_size_is_fetched_again(
    size: int, web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path)
    read(cache, shards[0])
    os.truncate(cache.path(shards[0]), size)
    assert read(cache, shards[0]) == content(shards[0].url)
    assert downloads(web) == 2


def test_a_failed_download_is_an_error_and_leaves_nothing(
    web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path)
    web.status(500, path="/s0.tar", skip=1)
    with pytest.raises(GigabatchError, match=r"s0\.tar: bytes 0 to 4000 could not be read in 3"):
        read(cache, shards[0])
    assert held(cache) == []
    web.heal()
    assert read(cache, shards[0]) == content(shards[0].url)


# Room


def test_the_least_recently_opened_copies_go_first(
    shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path, shards=3)
    for number in (0, 1, 2, 0, 3):
        read(cache, shards[number])
    assert held(cache) == sorted(cache.path(shards[i]).name for i in (2, 0, 3))
    read(cache, shards[4])
    assert held(cache) == sorted(cache.path(shards[i]).name for i in (0, 3, 4))


def test_evicted_copies_stay_readable_to_who_has_them_open(
    shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path, shards=2)
    files = [cache.open(s.url, s.bytes, s.version) for s in shards]
    assert len(held(cache)) == 2
    for file, shard in zip(files, shards, strict=True):
        assert os.pread(file, SIZE, 0) == content(shard.url)
        os.close(file)


def test_nothing_else_in_the_folder_is_counted_or_removed(
    shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path, shards=1)
    cache.folder.mkdir()
    (cache.folder / "mine.tar").write_bytes(bytes(9 * SIZE))
    for shard in shards[:2]:
        assert read(cache, shard) == content(shard.url)
    assert held(cache) == sorted([cache.path(shards[1]).name, "mine.tar"])


def test_a_shard_larger_than_the_cache_says_which_key_to_raise(
    web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    with pytest.raises(GigabatchError, match=r"s0\.tar: .*set data\.cache_gib higher") as caught:
        read(make(tmp_path, shards=0.9), shards[0])
    assert "\n" not in str(caught.value)
    assert web.requests == []


class _Watch:
    """Looks at the folder all the time, while nobody makes room; `most`: the largest total seen,
    in bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.ended = folder, 0, threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.ended.is_set():
            with open(self.folder / "lock", "w") as room:
                fcntl.flock(room, fcntl.LOCK_EX)
                sizes: dict[int, int] = {}  # by inode: a rename may show one file twice
                for path in self.folder.iterdir():
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        sizes[status.st_ino] = status.st_size
            self.most = max(self.most, sum(sizes.values()))
            time.sleep(0.001)

    def end(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.most


@pytest.mark.slow
@pytest.mark.parametrize("room", [1, 2, 4])
def test_many_processes_in_little_room_read_the_right_bytes_within_the_limit(
    room: int, shards: list[ShardState], tmp_path: Path, started: list[BaseProcess]
) -> None:
    cache = make(tmp_path, shards=room)
    cache.folder.mkdir()
    order = random.Random(room)
    begin = FORK.Barrier(6)
    processes = [
        start(started, read_all, cache, order.sample(shards * 4, 4 * len(shards)), begin)
        for _ in range(5)
    ]
    watch = _Watch(cache.folder)  # after the forks: it locks
    try:
        begin.wait(20)
        join(*processes)
    finally:
        most = watch.end()
    assert 0 < most <= room * SIZE
    assert parts(cache) == []


def test_a_download_waits_until_others_leave_room(
    web: FailingServer, shards: list[ShardState], tmp_path: Path, started: list[BaseProcess]
) -> None:
    cache = make(tmp_path, shards=1)
    go = threading.Event()
    web.before(lambda: go.wait(20), path="/s0.tar", skip=1, times=1)
    first = start(started, read_all, cache, shards[:1])
    wait_for(lambda: downloads(web) == 1, "the first process asked")
    second = start(started, read_all, cache, shards[1:2])
    time.sleep(0.3)
    assert downloads(web, shards[1]) == 0
    go.set()
    join(first, second)
    assert held(cache) == [cache.path(shards[1]).name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_costs_the_other_copies_and_then_is_an_error(
    small_disk: Path, web: FailingServer, shards: list[ShardState]
) -> None:
    cache = ShardCache(small_disk / "cache", 10**9, QUICK)
    for shard in shards[:3]:
        read(cache, shard)
    (small_disk / "ballast").write_bytes(bytes(20_480 - 4_096))  # what others wrote
    (small_disk / "more").write_bytes(bytes(4_096))
    for shard in (shards[3], shards[4], shards[5]):
        assert read(cache, shard) == content(shard.url)
    assert cache.path(shards[5]).name in held(cache)
    assert cache.path(shards[0]).name not in held(cache)
    for name in held(cache):
        (cache.folder / name).unlink()
    (small_disk / "more").write_bytes(bytes(16_384))  # and now there is no room at all
    with pytest.raises(GigabatchError, match=r"no room for .*No space left.*Free some space"):
        read(cache, shards[0])
    assert held(cache) == []
    assert downloads(web, shards[0]) == 1 + 2  # a full disk is not the server's fault: no retries


def test_a_folder_that_cannot_be_used_says_where_to_set_it(
    shards: list[ShardState], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = ShardCache(tmp_path / "file" / "cache", 10**9, QUICK)
    with pytest.raises(GigabatchError, match=r"file/cache: .*Not a directory.*GIGABATCH_CACHE"):
        read(cache, shards[0])


# Ahead


def test_prefetched_shards_are_there_when_they_are_opened(
    web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path)
    prefetch(cache, *shards, *shards)
    wait_for(lambda: len(list(cache.folder.glob("*.tar"))) == len(shards), "all are fetched")
    wait_for(lambda: not parts(cache), "and renamed")
    asked = len(web.requests)
    read_all(cache, shards)
    assert len(web.requests) == asked
    assert downloads(web) == len(shards)
    cache.close()


def test_an_open_waits_for_the_prefetch_of_its_own_process(
    web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path)
    web.before(lambda: time.sleep(0.3), path="/s0.tar", skip=1, times=1)
    prefetch(cache, shards[0])
    wait_for(lambda: downloads(web) == 1, "it is asked for")
    assert read(cache, shards[0]) == content(shards[0].url)
    assert downloads(web) == 1
    cache.close()


def test_a_prefetch_that_fails_leaves_it_to_the_open(
    web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path)
    web.status(404, path="/s0.tar", times=2)
    prefetch(cache, shards[0])
    wait_for(lambda: web.count(path="/s0.tar") == 1, "it is asked for")
    wait_for(lambda: not parts(cache), "it is given up")
    with pytest.raises(GigabatchError, match="HTTP 404"):
        read(cache, shards[0])
    assert read(cache, shards[0]) == content(shards[0].url)
    prefetch(cache, shards[0], shards[1])  # the threads are still there
    wait_for(lambda: cache.path(shards[1]).exists(), "the next is fetched")
    cache.close()


def test_a_shard_that_waits_is_not_queued_again(
    web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path)
    go = threading.Event()
    for path in ("/s0.tar", "/s1.tar"):
        web.before(lambda: go.wait(20), path=path, times=1)
    (tmp_path / "far" / "s2.tar").unlink()
    prefetch(cache, *shards[:2], *shards[2:3] * 5)
    wait_for(lambda: len(web.requests) == cache_module.FETCHERS, "both threads are at work")
    go.set()
    prefetch(cache, shards[3])
    wait_for(lambda: cache.path(shards[3]).exists(), "the last is fetched")
    cache.close()
    wait_for(no_threads, "all is done")
    assert web.count(path="/s2.tar") == 1


def test_processes_that_prefetch_the_same_shards_share_the_work(
    web: FailingServer, shards: list[ShardState], tmp_path: Path, started: list[BaseProcess]
) -> None:
    """While one is at the first two, the other goes on to what is left."""
    cache = make(tmp_path, retry=PATIENT)
    go = threading.Event()
    for path in ("/s0.tar", "/s1.tar"):
        web.before(lambda: go.wait(20), path=path, skip=1, times=1)
    busy = start(started, read_all, cache, shards[:1])
    busy_too = start(started, read_all, cache, shards[1:2])
    wait_for(lambda: downloads(web) == 2, "both are at it")
    prefetch(cache, *shards)
    wait_for(lambda: len(list(cache.folder.glob("*.tar"))) == 4, "the others are fetched")
    go.set()
    join(busy, busy_too)
    assert downloads(web) == len(shards)
    cache.close()


def test_closing_drops_what_waits_and_the_cache_goes_on(
    web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    cache = make(tmp_path)
    go = threading.Event()
    web.before(lambda: go.wait(20), times=cache_module.FETCHERS)
    prefetch(cache, *shards)
    wait_for(lambda: len(web.requests) == cache_module.FETCHERS, "the first are asked for")
    cache.close()
    go.set()
    wait_for(lambda: not any(t.name == "shard prefetch" for t in threading.enumerate()), "they end")
    assert downloads(web) == cache_module.FETCHERS
    prefetch(cache, shards[-1])
    wait_for(lambda: cache.path(shards[-1]).exists(), "it is fetched")
    cache.close()


AHEAD = """
import sys
from pathlib import Path
from gigabatch.data.remote.cache import ShardCache
url, size, folder = sys.argv[1:]
cache = ShardCache(Path(folder), 10**9)
cache.prefetch(url, int(size), "")
sys.stdin.readline()
"""


def test_a_process_ends_without_waiting_for_its_prefetch(
    web: FailingServer, shards: list[ShardState], tmp_path: Path
) -> None:
    web.stall(60, path="/s0.tar", skip=1, times=1)
    cache = make(tmp_path)
    script = [sys.executable, "-c", AHEAD, shards[0].url, str(SIZE), str(cache.folder)]
    with subprocess.Popen(script, stdin=subprocess.PIPE) as process:
        try:
            wait_for(lambda: downloads(web) == 1, "it is asked for")
            process.communicate(b"\n", timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert len(parts(cache)) == 1
    read_all(cache, shards[1:2])
    assert parts(cache) == []


# Other processes


def _prefetch_here(cache: ShardCache, shards: list[ShardState]) -> None:
    prefetch(cache, *shards)
    wait_for(lambda: all(cache.path(shard).exists() for shard in shards), "all are fetched")


def test_a_forked_process_has_a_prefetch_of_its_own(
    shards: list[ShardState], tmp_path: Path, started: list[BaseProcess]
) -> None:
    cache = make(tmp_path)
    _prefetch_here(cache, shards[:2])
    join(*(start(started, _prefetch_here, cache, shards[i : i + 2]) for i in (2, 4)))
    assert len(held(cache)) == len(shards)
    cache.close()


def test_a_pickle_takes_the_settings_along(shards: list[ShardState], tmp_path: Path) -> None:
    cache = make(tmp_path, shards=2)
    _prefetch_here(cache, shards[:1])
    other = pickle.loads(pickle.dumps(cache))
    assert (other.folder, other.limit_bytes, other.retry) == (cache.folder, 2 * SIZE, QUICK)
    _prefetch_here(other, shards[1:2])
    cache.close()
    other.close()


def test_the_nodes_cache_is_one_object_in_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GIGABATCH_CACHE", str(tmp_path))
    assert node_cache(0.5) is node_cache(0.5)
    assert node_cache(0.5).limit_bytes == GIB // 2
    assert node_cache(0.5).folder == tmp_path / "shards"
    assert node_cache().limit_bytes == 64 * GIB
