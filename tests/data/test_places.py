from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from servers import Answer, FailingServer, s3_server, upload, web_server

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote import places, ranges
from gigabatch.data.remote.places import expand, is_remote, stat_all
from gigabatch.data.remote.ranges import Retry, ShardState, fetch, read_range

SIZES = {"s0.tar": 20_000, "s1.tar": 3_000, "s2.tar": 1}
QUICK = Retry(attempts=3, first_wait_s=0.01, timeout_s=5)
NUMBERS = itertools.count()
IMPATIENT = Retry(attempts=3, first_wait_s=0.01, timeout_s=0.5)


class Far(NamedTuple):
    """A remote folder, the server it lies on, and the local folder that it is a copy of."""

    url: str
    server: FailingServer
    folder: Path


@pytest.fixture(scope="module")
def set_of_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "set"
    folder.mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        (folder / name).write_bytes(random.Random(seed).randbytes(size))
    (folder / "notes.txt").write_text("not a shard")
    return folder


@pytest.fixture
def folder(set_of_files: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    copy = tmp_path / "far" / "set"
    copy.mkdir(parents=True)
    for path in set_of_files.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def web(folder: Path) -> Iterator[Far]:
    with web_server(folder.parent) as server:
        yield Far(f"{server.url}/set", server, folder)


@pytest.fixture(scope="module")
def s3_of_all() -> Iterator[FailingServer]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(folder: Path, s3_of_all: FailingServer) -> Far:
    bucket = f"bucket-{next(NUMBERS)}"
    s3_of_all.heal()
    upload(s3_of_all, folder, bucket, "a/set")
    stat_all([f"s3://{bucket}/a/set/s0.tar"])  # the first client takes a good part of a second
    s3_of_all.requests.clear()
    return Far(f"s3://{bucket}/a/set", s3_of_all, folder)


@pytest.fixture(params=["web", pytest.param("s3", marks=pytest.mark.slow)])
def far(request: pytest.FixtureRequest) -> Far:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Far)
    return found


def write(far: Far, name: str, data: bytes) -> None:
    """Put a file on the server, in place of the one of that name."""
    (far.folder / name).write_bytes(data)
    if far.url.startswith("s3://"):
        upload(far.server, far.folder, *far.url.removeprefix("s3://").split("/", 1))


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(GigabatchError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def urls(far: Far, *names: str) -> list[str]:
    return [f"{far.url}/{name}" for name in names or sorted(SIZES)]


# Names


def test_folders_globs_braces_and_files_in_the_order_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "t.tar").write_bytes(b"")
    (folder / ".hidden.tar").write_bytes(b"")
    (folder / "folder.tar").mkdir()
    s0, s1, s2 = (str(folder / name) for name in sorted(SIZES))
    assert expand([str(folder)]) == [s0, s1, s2]
    assert expand([f"{folder}/s[12].tar", f"file://{s0}"]) == [s1, s2, s0]
    assert expand([f"{folder}/s{{2..0}}.tar"]) == [s0, s1, s2]
    assert expand([f"{folder}/**/*.tar"]) == [str(folder / "deep" / "t.tar"), s0, s1, s2]
    assert expand([str(folder)], default_glob="*.txt") == [str(folder / "notes.txt")]
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert expand(["set/s1.tar", "~/set/s0.tar"]) == [s1, s0]


def test_a_name_that_exists_is_no_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "a{1,2}[x]*.tar"
    odd.write_bytes(b"")
    assert expand([str(odd)]) == [str(odd)]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("{}/none.tar", "{}/none.tar: there is no such file"),
        ("{}/empty", "{}/empty: the folder holds no *.tar"),
        ("{}/x*.tar", "{}/x*.tar: the glob matches no file"),
        ("{}/set/s{{0..3}}.tar", "{}/set/s3.tar: there is no such file"),
        ("{}/set/s{{0..3.tar", "the braces do not match"),
    ],
)
def test_what_is_missing_is_named(path: str, says: str, folder: Path) -> None:
    (folder.parent / "empty").mkdir()
    assert says.format(folder.parent) in refusal(expand, [path.format(folder.parent)])


def test_a_shard_named_twice_is_refused(folder: Path) -> None:
    message = refusal(expand, [str(folder), str(folder / "s1.tar")])
    assert f"{folder}/s1.tar: the shard is named 2 times" in message
    assert "named 2 times" in refusal(expand, [f"{folder}/{{s0,s0}}.tar"])


@pytest.mark.parametrize(
    "address",
    ["pipe:touch {}", "PIPE:touch {}", "pipe://touch {}", "simplecache::pipe://touch {}",
     "simplecache::s3://bucket/a.tar", "zip://a.tar::https://host/b.zip", "ssh://host/a.tar",
     "memory://a.tar", "S3://bucket/a.tar", "filecache::{}"],
)  # fmt: skip
def test_addresses_that_could_run_or_chain_something_are_refused(
    address: str, tmp_path: Path
) -> None:
    address = address.format(tmp_path / "ran")
    for call in (is_remote, lambda path: expand([path]), lambda path: stat_all([path])):
        message = refusal(call, address)
        assert message.startswith(address)
        assert "nothing was executed" in message
    assert not (tmp_path / "ran").exists()


def test_what_is_remote() -> None:
    for path in (
        "s3://b/x.tar",
        "gs://b/x",
        "hf://datasets/u/r/x",
        "http://[::1]:80/x",
        "https://h",
    ):
        assert is_remote(path)
    for path in ("x.tar", "/a/b.tar", "file:///a/b.tar", "2024:x.tar", "a b://c", "./s3:/x"):
        assert not is_remote(path)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = refusal(stat_all, ["gs://bucket/x.tar"], retry=QUICK)
    assert "needs the package gcsfs" in message
    assert 'pip install "gigabatch[remote]"' in message


def test_remote_globs_and_braces(far: Far) -> None:
    assert expand([f"{far.url}/*.tar"], retry=QUICK) == urls(far)
    assert expand([f"{far.url}/s*.tar"], retry=QUICK) == urls(far)
    far.server.requests.clear()
    assert expand([f"{far.url}/s{{1..2}}.tar", f"{far.url}/s0.tar"]) == urls(
        far, "s1.tar", "s2.tar", "s0.tar"
    )
    assert far.server.requests == []  # a million names are not asked for one by one
    message = refusal(expand, [f"{far.url}/x*.tar"], retry=QUICK)
    assert message.startswith(f"{far.url}/x*.tar: the glob matches no file")


def test_a_folder_of_a_bucket(s3: Far) -> None:
    assert expand([s3.url], retry=QUICK) == expand([f"{s3.url}/"], retry=QUICK) == urls(s3)
    assert expand([f"{s3.url}/notes.txt"], retry=QUICK) == [f"{s3.url}/notes.txt"]
    for missing in (f"{s3.url}x", "s3://no-such-bucket/x"):
        assert f"{missing}: there is no such file, and no folder" in refusal(expand, [missing])
    for empty in ("s3://no-such-bucket/*.tar", f"{s3.url[:-3]}*"):  # a folder is no shard
        assert "the glob matches no file" in refusal(expand, [empty])


def test_a_web_address_with_a_query_is_one_file(web: Far) -> None:
    signed = f"{web.url}/s0.tar?signature=a%2Fb&x=[1]"
    assert expand([signed]) == [signed]
    assert stat_all([signed])[0].bytes == SIZES["s0.tar"]


def test_a_listing_is_tried_again(far: Far) -> None:
    far.server.status(503, times=2)
    assert expand([f"{far.url}/*.tar"], retry=QUICK) == urls(far)


# Sizes and versions


def test_local_states_change_with_the_file(folder: Path) -> None:
    names = expand([str(folder)])
    states = stat_all(names)
    assert states == [ShardState(n, os.stat(n).st_size, str(os.stat(n).st_mtime_ns)) for n in names]
    os.utime(names[1], ns=(0, 5))
    assert stat_all(names)[1] == ShardState(names[1], SIZES["s1.tar"], "5")
    os.unlink(names[2])
    assert refusal(stat_all, names).startswith(
        f"{names[2]}: the shard cannot be read: No such file"
    )


def test_remote_states_change_with_the_file(far: Far) -> None:
    states = stat_all(urls(far), retry=QUICK)
    assert [(s.url, s.bytes) for s in states] == list(zip(urls(far), SIZES.values(), strict=True))
    assert all(state.version for state in states)
    assert stat_all(urls(far)) == states
    write(far, "s1.tar", b"x" * SIZES["s1.tar"])
    now = stat_all(urls(far))
    assert [a == b for a, b in zip(now, states, strict=True)] == [True, False, True]


def test_an_empty_file_has_a_size(far: Far) -> None:
    write(far, "empty.tar", b"")
    assert stat_all(urls(far, "empty.tar"), retry=QUICK)[0].bytes == 0


def test_a_listing_tells_the_same_as_each_file_by_itself(
    s3: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = stat_all(urls(s3), retry=QUICK)
    assert s3.server.count("HEAD") == 3
    monkeypatch.setattr(places, "LISTED", 3)
    assert stat_all(urls(s3), retry=QUICK) == one_by_one
    assert (s3.server.count("HEAD"), s3.server.count("GET")) == (3, 1)
    s3.server.status(403, path="*list-type*")  # some keys allow reading, but no listing
    assert stat_all(urls(s3), retry=QUICK) == one_by_one
    assert s3.server.count("HEAD") == 6


def test_an_error_that_passes_does_not_matter_to_stating(web: Far, s3: Far) -> None:
    web.server.status(500, times=2, path="*/s1.tar")
    s3.server.status(500, times=2, path="*/s1.tar", method="HEAD")
    for far in (web, s3):
        assert [s.bytes for s in stat_all(urls(far), retry=QUICK)] == list(SIZES.values())


@pytest.mark.parametrize("code", [403, 404])
def test_a_shard_that_is_missing_or_forbidden_is_named_at_once(
    code: int, web: Far, s3: Far
) -> None:
    for far, method in ((web, "GET"), (s3, "HEAD")):
        far.server.status(code, path="*/s1.tar", method=method)
        message = refusal(stat_all, urls(far), retry=QUICK)
        assert message.startswith(f"{far.url}/s1.tar: its size cannot be read: ")
        assert far.server.count(method, "*/s1.tar") == 1


def test_a_file_whose_size_is_not_told_is_refused() -> None:
    server = FailingServer(lambda _: Answer(206, {"Content-Range": "bytes 0-0/*"}, b"x"))
    try:
        message = refusal(stat_all, [f"{server.url}/s.tar"], retry=QUICK)
        assert "does not tell the file's size" in message
    finally:
        server.close()


# Bytes


def test_ranges_are_the_files_bytes(far: Far) -> None:
    data = (far.folder / "s0.tar").read_bytes()
    url = f"{far.url}/s0.tar"
    for start, end in ((0, 1), (0, 20_000), (7, 12_345), (19_999, 20_000)):
        assert read_range(url, start, end, QUICK) == data[start:end]
    far.server.requests.clear()
    assert read_range(url, 50, 50, QUICK) == b""
    assert far.server.requests == []


FAULTS: dict[str, Callable[[FailingServer], None]] = {
    "500": lambda server: server.status(500, times=2),
    "503": lambda server: server.status(503, times=2),
    "429": lambda server: server.status(429, times=2),
    "stall": lambda server: server.stall(30, times=1),
    "cut": lambda server: server.cut(times=2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_retried_and_costs_no_byte(
    fault: str, far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    FAULTS[fault](far.server)
    url, data = f"{far.url}/s0.tar", (far.folder / "s0.tar").read_bytes()
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "gigabatch.data.remote.ranges"):
        assert read_range(url, 100, 19_000, IMPATIENT) == data[100:19_000]
    assert time.monotonic() - began < 5
    failed = far.server.rules[0].times
    assert far.server.count() == failed + 1  # no other layer retries
    warnings = [r.getMessage() for r in caplog.records if r.name == "gigabatch.data.remote.ranges"]
    assert len(warnings) == failed
    assert all(f"{url}: bytes 100 to 19000, attempt " in warning for warning in warnings)


ENDLESS: dict[str, tuple[Callable[[FailingServer], None], str]] = {
    "500": (lambda server: server.status(500), "HTTP 500"),
    "stall": (lambda server: server.stall(30), "no complete answer in time"),
    "drip": (lambda server: server.drip(0.05), "no complete answer in time"),
    "cut": (lambda server: server.cut(), "Error"),
}


@pytest.mark.parametrize("fault", ENDLESS)
def test_a_fault_that_stays_ends_with_where_and_why(fault: str, far: Far) -> None:
    begin, why = ENDLESS[fault]
    begin(far.server)
    url = f"{far.url}/s0.tar"
    message = refusal(read_range, url, 5, 900, IMPATIENT)
    assert message.startswith(f"{url}: bytes 5 to 900 could not be read in 3 attempts, the last: ")
    assert why in message
    assert far.server.count() == 3


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_what_no_second_try_can_change_is_fatal_at_once(code: int, far: Far) -> None:
    far.server.status(code)
    message = refusal(read_range, f"{far.url}/s0.tar", 5, 900, QUICK)
    assert message.startswith(f"{far.url}/s0.tar: bytes 5 to 900 cannot be read: ")
    assert far.server.count() == 1


def test_a_range_past_the_end_is_fatal(far: Far) -> None:
    refusal(read_range, f"{far.url}/s1.tar", 5000, 6000, QUICK)
    assert far.server.count() == 1
    message = refusal(read_range, f"{far.url}/s1.tar", 2000, 6000, QUICK)
    assert "1000 of 4000 bytes came" in message


def test_a_server_that_ignores_ranges(far: Far) -> None:
    far.server.ignore_range()
    data = (far.folder / "s0.tar").read_bytes()
    for start, end in ((0, 10), (5000, 5010), (12_000, 20_000)):
        assert read_range(f"{far.url}/s0.tar", start, end, QUICK) == data[start:end]


def test_a_web_page_is_not_taken_for_the_file(web: Far) -> None:
    web.server.send_html()
    assert "a web page" in refusal(read_range, f"{web.url}/s0.tar", 0, 10, QUICK)


def test_another_range_than_asked_for_is_not_taken() -> None:
    answer = Answer(206, {"Content-Range": "bytes 0-9/100"}, b"0123456789")
    server = FailingServer(lambda _: answer)
    try:
        message = refusal(read_range, f"{server.url}/s.tar", 10, 20, QUICK)
        assert "another range was sent: bytes 0-9/100" in message
    finally:
        server.close()


def test_a_server_that_is_gone_is_named(web: Far) -> None:
    web.server.close()
    message = refusal(read_range, f"{web.url}/s0.tar", 0, 10, QUICK)
    assert "3 attempts" in message
    assert "Cannot connect" in message


def test_waits_grow_and_differ_between_urls() -> None:
    retry = Retry(first_wait_s=0.5)
    for attempt, least in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0)):
        waits = {retry.wait_s(attempt, f"s3://b/{i}.tar") for i in range(20)}
        assert len(waits) == 20
        assert all(least <= wait <= 1.5 * least for wait in waits)


# Whole files


def fetched(far: Far, to: Path, name: str = "s0.tar", retry: Retry = QUICK) -> bytes:
    state = stat_all([f"{far.url}/{name}"], retry=QUICK)[0]
    far.server.requests.clear()
    fetch(state.url, state.bytes, to, state.version, retry)
    return to.read_bytes()


@pytest.mark.parametrize("chunk", [20_000, 6_000, 5_000])
def test_a_file_is_fetched_in_chunks(
    chunk: int, far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CHUNK", chunk)
    assert fetched(far, tmp_path / "copy") == (far.folder / "s0.tar").read_bytes()
    chunks = [r.range for r in far.server.requests if r.range not in ("", "0-0")]
    edges = [*range(0, 20_000, chunk), 20_000]
    assert chunks == [f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_on_the_way_leave_a_whole_file(
    fault: str, far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CHUNK", 6_000)
    state = stat_all([f"{far.url}/s0.tar"])[0]
    FAULTS[fault](far.server)
    far.server.rules[0].path = "*/s0.tar"
    far.server.rules[0].skip = 3 if far.url.startswith("http") else 2  # its size, two chunks
    far.server.requests.clear()
    fetch(state.url, state.bytes, tmp_path / "copy", state.version, IMPATIENT)
    assert (tmp_path / "copy").read_bytes() == (far.folder / "s0.tar").read_bytes()
    assert far.server.count(range="12000-17999") == 1 + (far.server.rules[0].times or 0)


def test_a_server_that_ignores_ranges_sends_a_file_once(
    web: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CHUNK", 1_000)
    web.server.ignore_range()
    assert fetched(web, tmp_path / "copy") == (web.folder / "s0.tar").read_bytes()
    assert web.server.count(range="0-999") == len(web.server.requests) - 2 == 1
    web.server.rules.clear()
    web.server.ignore_range(skip=5, times=1)  # of two minds: after three chunks
    assert fetched(web, tmp_path / "again") == (web.folder / "s0.tar").read_bytes()
    assert [r.range for r in web.server.requests[1:-1]] == [
        "0-999", "1000-1999", "2000-2999", "3000-3999"
    ]  # fmt: skip


def test_a_whole_file_may_take_its_time_as_long_as_bytes_come(web: Far, tmp_path: Path) -> None:
    web.server.ignore_range(rest=0.05)
    began = time.monotonic()
    assert fetched(web, tmp_path / "copy", retry=IMPATIENT)
    assert time.monotonic() - began > IMPATIENT.timeout_s
    assert web.server.count(range="0-19999") == 1


def failing(far: Far, to: Path, *state: object, retry: Retry = QUICK) -> str:
    """The refusal of a fetch that must leave the folder of `to` as it was."""
    before = sorted(to.parent.iterdir())
    message = refusal(fetch, state[0], state[1], to, state[2], retry)
    assert sorted(to.parent.iterdir()) == before
    return message


def test_a_failure_leaves_nothing_and_what_was_there(far: Far, tmp_path: Path) -> None:
    state = stat_all([f"{far.url}/s0.tar"])[0]
    far.server.status(500, path="*/s0.tar")
    failing(far, tmp_path / "copy", state.url, state.bytes, state.version)
    (tmp_path / "copy").write_bytes(b"old")
    failing(far, tmp_path / "copy", state.url, state.bytes, state.version)
    assert (tmp_path / "copy").read_bytes() == b"old"


@pytest.mark.parametrize("size", [19_999, 20_001])
def test_a_file_of_another_size_is_refused(size: int, far: Far, tmp_path: Path) -> None:
    message = failing(far, tmp_path / "copy", f"{far.url}/s0.tar", size, "")
    assert f"{far.url}/s0.tar: changed after it was indexed: 20000 bytes" in message


def test_a_file_of_another_version_is_refused(far: Far, tmp_path: Path) -> None:
    message = failing(far, tmp_path / "copy", f"{far.url}/s0.tar", 20_000, '"other"')
    assert "changed after it was indexed" in message


def test_a_file_that_changes_on_the_way_is_refused(
    web: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CHUNK", 6_000)
    state = stat_all([f"{web.url}/s0.tar"])[0]
    web.server.before(lambda: (web.folder / "s0.tar").write_bytes(bytes(20_000)), skip=3, times=1)
    message = failing(web, tmp_path / "copy", state.url, state.bytes, state.version)
    assert "changed after it was indexed" in message


# Forks


def _read(url: str, expected: bytes, results: multiprocessing.SimpleQueue[bool]) -> None:
    for _ in range(3):
        results.put(read_range(url, 10, 2_000, QUICK) == expected)


def test_a_forked_process_reads_on_its_own_and_its_parent_goes_on(far: Far) -> None:
    url = f"{far.url}/s1.tar"
    expected = (far.folder / "s1.tar").read_bytes()[10:2_000]
    assert read_range(url, 10, 2_000, QUICK) == expected
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    children = [fork.Process(target=_read, args=(url, expected, results)) for _ in range(2)]
    began = time.monotonic()
    for child in children:
        child.start()
    assert [results.get() for _ in range(6)] == [True] * 6
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    for _ in range(3):
        assert read_range(url, 10, 2_000, QUICK) == expected
    assert time.monotonic() - began < QUICK.timeout_s  # no request had to be tried again
