from __future__ import annotations

import itertools
import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from remote_folder import QUICK, SHORT, RemoteFolder, error_message
from servers import Answer, FailingServer

from gigabatch.data.remote import access
from gigabatch.data.remote.access import Retry, fetch, read_range
from gigabatch.data.remote.locations import stat_all


def test_read_range_returns_the_files_bytes(remote: RemoteFolder) -> None:
    data = (remote.folder / "s0.tar").read_bytes()
    url = f"{remote.url}/s0.tar"
    for start, end in ((0, 1), (0, 20_000), (7, 12_345), (19_999, 20_000)):
        assert read_range(url, start, end, QUICK) == data[start:end]
    remote.server.requests.clear()
    assert read_range(url, 50, 50, QUICK) == b""
    assert remote.server.requests == []


TEMPORARY_ERRORS: dict[str, Callable[[FailingServer], None]] = {
    "500": lambda server: server.status(500, times=2),
    "503": lambda server: server.status(503, times=2),
    "429": lambda server: server.status(429, times=2),
    "stall": lambda server: server.stall(30, times=1),
    "hang up": lambda server: server.hang_up(times=2),
}


def timeouts(error: str) -> Retry:
    """Return a short timeout if only the timeout ends a request, else one for a busy machine."""
    return SHORT if error in ("stall", "drip") else QUICK


@pytest.mark.parametrize("error", TEMPORARY_ERRORS)
def test_read_range_after_temporary_error_returns_all_bytes(
    error: str, remote: RemoteFolder, caplog: pytest.LogCaptureFixture
) -> None:
    TEMPORARY_ERRORS[error](remote.server)
    url, data = f"{remote.url}/s0.tar", (remote.folder / "s0.tar").read_bytes()
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "gigabatch.data.remote.access"):
        assert read_range(url, 100, 19_000, timeouts(error)) == data[100:19_000]
    assert time.monotonic() - start < 5
    failures = remote.server.rules[0].times
    assert remote.server.count() == failures + 1  # no other layer retries
    warnings = [r.getMessage() for r in caplog.records if r.name == "gigabatch.data.remote.access"]
    assert len(warnings) == failures
    assert all(f"{url}: bytes 100 to 19000, attempt " in warning for warning in warnings)


PERMANENT_ERRORS: dict[str, tuple[Callable[[FailingServer], None], str]] = {
    "500": (lambda server: server.status(500), "HTTP 500"),
    "stall": (lambda server: server.stall(30), "no complete response in time"),
    "drip": (lambda server: server.drip(0.5), "no complete response in time"),
    "hang up": (lambda server: server.hang_up(), "Error"),
}


@pytest.mark.parametrize("error", PERMANENT_ERRORS)
def test_read_range_after_permanent_error_names_range_and_reason(
    error: str, remote: RemoteFolder
) -> None:
    fail, reason = PERMANENT_ERRORS[error]
    fail(remote.server)
    url = f"{remote.url}/s0.tar"
    message = error_message(read_range, url, 5, 900, timeouts(error))
    problem = "bytes 5 to 900 could not be read in 3 attempts; the last error: "
    assert message.startswith(f"{url}: {problem}")
    assert reason in message
    assert remote.server.count() == 3


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_final_status_fails_without_retry(code: int, remote: RemoteFolder) -> None:
    remote.server.status(code)
    message = error_message(read_range, f"{remote.url}/s0.tar", 5, 900, QUICK)
    assert message.startswith(f"{remote.url}/s0.tar: bytes 5 to 900 cannot be read: ")
    assert remote.server.count() == 1


def test_range_past_the_end_raises(remote: RemoteFolder) -> None:
    error_message(read_range, f"{remote.url}/s1.tar", 5000, 6000, QUICK)
    assert remote.server.count() == 1
    message = error_message(read_range, f"{remote.url}/s1.tar", 2000, 6000, QUICK)
    assert "1000 of 4000 bytes arrived" in message


def test_read_range_from_web_server_that_ignores_ranges_returns_the_range(
    site: RemoteFolder,
) -> None:
    site.server.ignore_range()
    data = (site.folder / "s0.tar").read_bytes()
    for start, end in ((0, 10), (5000, 5010), (12_000, 20_000)):
        assert read_range(f"{site.url}/s0.tar", start, end, QUICK) == data[start:end]


def test_web_page_instead_of_file_raises(site: RemoteFolder) -> None:
    site.server.send_html()
    assert "a web page" in error_message(read_range, f"{site.url}/s0.tar", 0, 10, QUICK)


def test_wrong_content_range_raises() -> None:
    answer = Answer(206, {"Content-Range": "bytes 0-9/100"}, b"0123456789")
    server = FailingServer(lambda _: answer)
    try:
        message = error_message(read_range, f"{server.url}/s.tar", 10, 20, QUICK)
        assert "a different range was sent: bytes 0-9/100" in message
    finally:
        server.close()


def test_unreachable_server_raises_after_all_attempts(site: RemoteFolder) -> None:
    site.server.close()
    message = error_message(read_range, f"{site.url}/s0.tar", 0, 10, QUICK)
    assert "3 attempts" in message
    assert "Cannot connect" in message


def test_retry_waits_double_and_differ_between_urls() -> None:
    retry = Retry(first_wait_s=0.5)
    for attempt, shortest in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0)):
        waits = {retry.wait_s(attempt, f"s3://b/{i}.tar") for i in range(20)}
        assert len(waits) == 20
        assert all(shortest <= wait <= 1.5 * shortest for wait in waits)


# Fetches of complete files


def fetch_file(remote: RemoteFolder, to: Path, name: str = "s0.tar", retry: Retry = QUICK) -> bytes:
    state = stat_all([f"{remote.url}/{name}"], retry=QUICK)[0]
    remote.server.requests.clear()
    fetch(state.url, state.bytes, to, state.version, retry)
    return to.read_bytes()


@pytest.mark.parametrize("chunk", [20_000, 6_000, 5_000])
def test_fetch_requests_consecutive_chunks(
    chunk: int, remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "CHUNK", chunk)
    assert fetch_file(remote, tmp_path / "copy") == (remote.folder / "s0.tar").read_bytes()
    chunks = [r.range for r in remote.server.requests if r.range not in ("", "0-0")]
    edges = [*range(0, 20_000, chunk), 20_000]
    assert chunks == [f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("error", TEMPORARY_ERRORS)
def test_fetch_with_errors_in_the_middle_writes_the_complete_file(
    error: str, remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "CHUNK", 6_000)
    state = stat_all([f"{remote.url}/s0.tar"])[0]
    TEMPORARY_ERRORS[error](remote.server)
    remote.server.rules[0].path = "*/s0.tar"
    # Skip the size (on the web) and two chunks.
    remote.server.rules[0].skip = 3 if remote.url.startswith("http") else 2
    remote.server.requests.clear()
    fetch(state.url, state.bytes, tmp_path / "copy", state.version, SHORT)
    assert (tmp_path / "copy").read_bytes() == (remote.folder / "s0.tar").read_bytes()
    assert remote.server.count(range="12000-17999") == 1 + (remote.server.rules[0].times or 0)


def test_fetch_from_server_that_ignores_ranges_transfers_the_file_once(
    site: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "CHUNK", 1_000)
    site.server.ignore_range()
    assert fetch_file(site, tmp_path / "copy") == (site.folder / "s0.tar").read_bytes()
    assert site.server.count(range="0-999") == len(site.server.requests) - 2 == 1
    site.server.rules.clear()
    site.server.ignore_range(skip=5, times=1)  # ignores one range, after three chunks
    assert fetch_file(site, tmp_path / "again") == (site.folder / "s0.tar").read_bytes()
    assert [r.range for r in site.server.requests[1:-1]] == [
        "0-999", "1000-1999", "2000-2999", "3000-3999"
    ]  # fmt: skip


def test_complete_file_may_exceed_the_timeout_while_bytes_arrive(
    site: RemoteFolder, tmp_path: Path
) -> None:
    site.server.ignore_range(pause_s=0.05)
    start = time.monotonic()
    assert fetch_file(site, tmp_path / "copy", retry=SHORT)
    assert time.monotonic() - start > SHORT.timeout_s
    assert site.server.count(range="0-19999") == 1


def failing_fetch(to: Path, url: str, size: int, version: str) -> str:
    """Return the error of a fetch; it must leave the folder of `to` unchanged."""
    before = sorted(to.parent.iterdir())
    message = error_message(fetch, url, size, to, version, QUICK)
    assert sorted(to.parent.iterdir()) == before
    return message


def test_failed_fetch_leaves_the_folder_unchanged(remote: RemoteFolder, tmp_path: Path) -> None:
    state = stat_all([f"{remote.url}/s0.tar"])[0]
    remote.server.status(500, path="*/s0.tar")
    failing_fetch(tmp_path / "copy", state.url, state.bytes, state.version)
    (tmp_path / "copy").write_bytes(b"old")
    failing_fetch(tmp_path / "copy", state.url, state.bytes, state.version)
    assert (tmp_path / "copy").read_bytes() == b"old"


@pytest.mark.parametrize("size", [19_999, 20_001])
def test_fetch_of_file_with_other_size_raises(
    size: int, remote: RemoteFolder, tmp_path: Path
) -> None:
    message = failing_fetch(tmp_path / "copy", f"{remote.url}/s0.tar", size, "")
    assert f"{remote.url}/s0.tar: changed after it was indexed: 20000 bytes" in message


def test_fetch_of_file_with_other_version_raises(remote: RemoteFolder, tmp_path: Path) -> None:
    message = failing_fetch(tmp_path / "copy", f"{remote.url}/s0.tar", 20_000, '"other"')
    assert "changed after it was indexed" in message


def test_fetch_of_file_that_changes_during_the_fetch_raises(
    site: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "CHUNK", 6_000)
    state = stat_all([f"{site.url}/s0.tar"])[0]
    site.server.before(lambda: (site.folder / "s0.tar").write_bytes(bytes(20_000)), skip=3, times=1)
    message = failing_fetch(tmp_path / "copy", state.url, state.bytes, state.version)
    assert "changed after it was indexed" in message


# Forks


def _read(url: str, expected: bytes, results: multiprocessing.SimpleQueue[bool]) -> None:
    for _ in range(3):
        results.put(read_range(url, 10, 2_000, QUICK) == expected)


def test_forked_processes_and_their_parent_read_without_retries(remote: RemoteFolder) -> None:
    url = f"{remote.url}/s1.tar"
    expected = (remote.folder / "s1.tar").read_bytes()[10:2_000]
    assert read_range(url, 10, 2_000, QUICK) == expected
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    children = [fork.Process(target=_read, args=(url, expected, results)) for _ in range(2)]
    start = time.monotonic()
    for child in children:
        child.start()
    assert [results.get() for _ in range(6)] == [True] * 6
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    for _ in range(3):
        assert read_range(url, 10, 2_000, QUICK) == expected
    assert time.monotonic() - start < QUICK.timeout_s  # no request was repeated
