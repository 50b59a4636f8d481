from __future__ import annotations

import itertools
import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from far import IMPATIENT, QUICK, Far, refusal
from servers import Answer, FailingServer

from gigabatch.data.remote import ranges
from gigabatch.data.remote.places import stat_all
from gigabatch.data.remote.ranges import Retry, fetch, read_range


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


def patience(fault: str) -> Retry:
    """Little for what only a time-out ends; else so much that a busy machine is not a fault too."""
    return IMPATIENT if fault in ("stall", "drip") else QUICK


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_retried_and_costs_no_byte(
    fault: str, far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    FAULTS[fault](far.server)
    url, data = f"{far.url}/s0.tar", (far.folder / "s0.tar").read_bytes()
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "gigabatch.data.remote.ranges"):
        assert read_range(url, 100, 19_000, patience(fault)) == data[100:19_000]
    assert time.monotonic() - began < 5
    failed = far.server.rules[0].times
    assert far.server.count() == failed + 1  # no other layer retries
    warnings = [r.getMessage() for r in caplog.records if r.name == "gigabatch.data.remote.ranges"]
    assert len(warnings) == failed
    assert all(f"{url}: bytes 100 to 19000, attempt " in warning for warning in warnings)


ENDLESS: dict[str, tuple[Callable[[FailingServer], None], str]] = {
    "500": (lambda server: server.status(500), "HTTP 500"),
    "stall": (lambda server: server.stall(30), "no complete answer in time"),
    "drip": (lambda server: server.drip(0.5), "no complete answer in time"),
    "cut": (lambda server: server.cut(), "Error"),
}


@pytest.mark.parametrize("fault", ENDLESS)
def test_a_fault_that_stays_ends_with_where_and_why(fault: str, far: Far) -> None:
    begin, why = ENDLESS[fault]
    begin(far.server)
    url = f"{far.url}/s0.tar"
    message = refusal(read_range, url, 5, 900, patience(fault))
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


def test_a_web_page_is_not_taken_for_the_file(site: Far) -> None:
    site.server.send_html()
    assert "a web page" in refusal(read_range, f"{site.url}/s0.tar", 0, 10, QUICK)


def test_another_range_than_asked_for_is_not_taken() -> None:
    answer = Answer(206, {"Content-Range": "bytes 0-9/100"}, b"0123456789")
    server = FailingServer(lambda _: answer)
    try:
        message = refusal(read_range, f"{server.url}/s.tar", 10, 20, QUICK)
        assert "another range was sent: bytes 0-9/100" in message
    finally:
        server.close()


def test_a_server_that_is_gone_is_named(site: Far) -> None:
    site.server.close()
    message = refusal(read_range, f"{site.url}/s0.tar", 0, 10, QUICK)
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
    site: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CHUNK", 1_000)
    site.server.ignore_range()
    assert fetched(site, tmp_path / "copy") == (site.folder / "s0.tar").read_bytes()
    assert site.server.count(range="0-999") == len(site.server.requests) - 2 == 1
    site.server.rules.clear()
    site.server.ignore_range(skip=5, times=1)  # of two minds: after three chunks
    assert fetched(site, tmp_path / "again") == (site.folder / "s0.tar").read_bytes()
    assert [r.range for r in site.server.requests[1:-1]] == [
        "0-999", "1000-1999", "2000-2999", "3000-3999"
    ]  # fmt: skip


def test_a_whole_file_may_take_its_time_as_long_as_bytes_come(site: Far, tmp_path: Path) -> None:
    site.server.ignore_range(rest=0.05)
    began = time.monotonic()
    assert fetched(site, tmp_path / "copy", retry=IMPATIENT)
    assert time.monotonic() - began > IMPATIENT.timeout_s
    assert site.server.count(range="0-19999") == 1


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
    site: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CHUNK", 6_000)
    state = stat_all([f"{site.url}/s0.tar"])[0]
    site.server.before(lambda: (site.folder / "s0.tar").write_bytes(bytes(20_000)), skip=3, times=1)
    message = failing(site, tmp_path / "copy", state.url, state.bytes, state.version)
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
