"""Remote files with patience: failed requests are tried again with growing waits, then fatal.

Bytes are read in ranges and written where they belong; a file that is no longer the one that was
indexed is refused, before and after it is copied. Nothing comes short in silence.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote import transport

log = logging.getLogger(__name__)
T = TypeVar("T")
CHUNK = 8 << 20
"""Bytes of a range when a whole file is copied."""
VERSIONS = (
    "ETag", "etag", "md5Hash", "blob_id", "oid", "LastModified", "Last-Modified", "last_modified",
    "mtime",
)  # fmt: skip
"""What tells versions of a file apart, best first; which of them there are, the server decides."""


@dataclass(frozen=True)
class Retry:
    """How often a remote request is tried (`attempts`), the wait before the second try (it doubles
    each time, plus up to a half, so that processes do not come back at once), and how long one
    try may take. In seconds."""

    attempts: int = 5
    first_wait_s: float = 0.5
    timeout_s: float = 60.0

    def wait_s(self, attempt: int, url: str) -> float:
        """After failed try number `attempt`, from 1."""
        spread = zlib.crc32(f"{url} {attempt} {os.getpid()}".encode()) / (1 << 32)
        return self.first_wait_s * 2.0 ** (attempt - 1) * (1 + spread / 2)


@dataclass(frozen=True)
class ShardState:
    """A shard as it is now. `url`: an absolute path or a URL. `version`: changes when the file
    does; empty where the server tells nothing of the kind."""

    url: str
    bytes: int
    version: str


def stat(url: str, retry: Retry = Retry()) -> ShardState:
    """The state of one file. Raises GigabatchError where it is missing or may not be read."""
    found = retrying(url, "its size", retry, lambda: transport.info(url, retry.timeout_s))
    return as_state(url, found)


def entries(url: str, retry: Retry = Retry()) -> dict[str, dict[str, Any]]:
    """URL -> info of the files in a folder, or that a glob matches; empty where there are none."""
    return retrying(url, "its listing", retry, lambda: transport.entries(url, retry.timeout_s))


def as_state(url: str, info: dict[str, Any]) -> ShardState:
    if info.get("type") == "directory":
        raise GigabatchError(f"{url}: this is a folder, not a shard. Name what lies in it.")
    if info.get("size") is None:
        raise GigabatchError(
            f"{url}: the server does not tell the file's size, which the index needs. Serve it "
            "with a Content-Length."
        )
    version = next((info[name] for name in VERSIONS if info.get(name)), "")
    return ShardState(url, int(info["size"]), str(version))


def read_range(url: str, start: int, end: int, retry: Retry = Retry()) -> bytes:
    """The bytes [start, end) of a remote file.

    Raises GigabatchError after the last of `retry.attempts`; at once where the file is missing or
    may not be read.
    """
    data = bytearray()

    def once() -> None:
        data.clear()
        got = transport.copy_range(url, start, end, end, data.extend, retry.timeout_s)
        _all(got, end - start)

    if start < end:
        retrying(url, f"bytes {start} to {end}", retry, once)
    return bytes(data)


def fetch(url: str, size: int, to: Path, version: str = "", retry: Retry = Retry()) -> None:
    """Copy a remote file of `size` bytes to `to`, which appears whole or not at all.

    Raises GigabatchError where the file is no longer of that size and version.
    """
    fresh = to.with_name(f".{to.name}.{os.getpid()}.part")
    try:
        with open(fresh, "wb", buffering=0) as file:
            copy(ShardState(url, size, version), file, retry)
        os.replace(fresh, to)
    finally:
        fresh.unlink(missing_ok=True)


def copy(shard: ShardState, file: FileIO, retry: Retry = Retry()) -> None:
    """Write a remote file to the start of an open local one, and sync it.

    Raises GigabatchError as `fetch` does; OSError where `file` cannot be written.
    """
    _refuse_changed(shard, retry)
    at = 0
    while at < shard.bytes:
        end = min(at + CHUNK, shard.bytes)

        def once(at: int = at, end: int = end) -> int:
            sink = _Sink(file, at)
            last = shard.bytes
            got = transport.copy_range(shard.url, at, end, last, sink.write, retry.timeout_s)
            return _all(got, end - at)

        at += retrying(shard.url, f"bytes {at} to {end}", retry, once)
    os.fsync(file.fileno())
    _refuse_changed(shard, retry)  # or half of it may be old and half new


def _refuse_changed(shard: ShardState, retry: Retry) -> None:
    now = stat(shard.url, retry)
    if now.bytes != shard.bytes or (shard.version and now.version != shard.version):
        raise GigabatchError(
            f"{shard.url}: changed after it was indexed: {now.bytes} bytes, version "
            f"{now.version or 'unknown'}; it was {shard.bytes} bytes, version "
            f"{shard.version or 'unknown'}. Put the old file back, or index the set again."
        )


class _Sink:
    """Writes at its own position, without a buffer: a fork meanwhile cannot write twice."""

    def __init__(self, file: FileIO, at: int) -> None:
        self.file, self.at = file, at

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                done = os.pwrite(self.file.fileno(), view, self.at)
            except OSError as error:
                raise LocalFault(error) from error
            self.at += done
            view = view[done:]


class LocalFault(Exception):
    """An OSError of the disk here, not of the server there."""


def _all(got: int, wanted: int) -> int:
    if got < wanted:
        raise OSError(f"{got} of {wanted} bytes came")
    return got


def retrying(url: str, what: str, retry: Retry, once: Callable[[], T], done: str = "read") -> T:
    """`once()`, tried again with growing waits; `what` of `url` is `done`, for messages."""
    for attempt in range(1, retry.attempts + 1):
        try:
            return once()
        except GigabatchError:
            raise
        except LocalFault as fault:
            raise fault.args[0] from None
        except Exception as error:
            why = transport.reason(error)
            if transport.is_final(error):
                raise GigabatchError(
                    f"{url}: {what} cannot be {done}: {why}. Check the address, and that it may be "
                    f"{done} with the keys set here."
                ) from error
            if attempt == retry.attempts:
                raise GigabatchError(
                    f"{url}: {what} could not be {done} in {attempt} attempts, the last: {why}. "
                    "Check the server and the network, then start again."
                ) from error
            wait = retry.wait_s(attempt, url)
            log.warning(
                "%s: %s, attempt %d of %d: %s; trying again in %.1f s",
                url, what, attempt, retry.attempts, why, wait,
            )  # fmt: skip
            time.sleep(wait)
    raise ValueError(f"attempts must be at least 1, not {retry.attempts}")
