"""Access remote files with retries: state, listing, reading, copying, writing, removal."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote import transport
from gigabatch.data.remote.object_stores import Info

log = logging.getLogger(__name__)
T = TypeVar("T")
CHUNK = 8 << 20
"""Bytes per request when a complete file is copied."""
VERSIONS = ("ETag", "e_tag", "blob_id", "oid", "Last-Modified", "last_modified", "mtime")
"""Fields that identify the version of a file, best first; servers differ in what they send."""


@dataclass(frozen=True)
class Retry:
    """Limits of one remote request.

    The wait before an attempt doubles each time, and up to half of it is added, so that processes
    do not retry at the same moment. An attempt may take `timeout_s` seconds.
    """

    attempts: int = 5
    first_wait_s: float = 0.5
    timeout_s: float = 60.0

    def wait_s(self, attempt: int, url: str) -> float:
        """Return the seconds to wait after failed attempt number `attempt`, from 1."""
        jitter = zlib.crc32(f"{url} {attempt} {os.getpid()}".encode()) / (1 << 32)
        return self.first_wait_s * 2.0 ** (attempt - 1) * (1 + jitter / 2)


@dataclass(frozen=True)
class ShardState:
    """The current state of a file."""

    url: str  # or an absolute path
    bytes: int
    version: str  # changes when the file does; empty if the server reports no version


QUICK = Retry(attempts=2, first_wait_s=0.5, timeout_s=15.0)


class FileTaken(GigabatchError):
    """Raised when an exclusive write finds an existing file."""


class _DiskError(Exception):
    """Wraps an OSError of the local disk, which a retry cannot fix."""


def stat(url: str, retry: Retry = Retry()) -> ShardState:
    """Return the state of a file.

    Raises:
        GigabatchError: if the file is missing, cannot be read, or has no known size.
    """
    info = retrying(url, "its size", retry, lambda: transport.info(url, retry.timeout_s))
    return as_state(url, info)


def entries(url: str, retry: Retry = Retry(), recursive: bool = False) -> dict[str, Info]:
    """Return URL -> info of the files in a folder, or of those that match a glob.

    Args:
        url: Folder or glob.
        retry: Limits of the request.
        recursive: Include all files below the folder.

    Returns:
        An empty dict if there are no files.

    Raises:
        GigabatchError: as `retrying`.
    """
    return retrying(
        url, "its listing", retry, lambda: transport.entries(url, retry.timeout_s, recursive)
    )


def as_state(url: str, info: Info) -> ShardState:
    if info.get("type") == "directory":
        raise GigabatchError(f"{url}: this is a folder, not a shard. Name the files in it.")
    if info.get("size") is None:
        raise GigabatchError(
            f"{url}: the server does not send the file's size, which the index needs. Serve it "
            "with a Content-Length."
        )
    version = next((info[name] for name in VERSIONS if info.get(name)), "")
    return ShardState(url, int(info["size"]), str(version))


def read_range(url: str, start: int, end: int, retry: Retry = Retry()) -> bytes:
    """Return the bytes [start, end) of a remote file.

    Raises:
        GigabatchError: as `retrying`.
    """
    data = bytearray()

    def once() -> None:
        data.clear()
        transport.copy_range(url, start, end, end, data.extend, retry.timeout_s)

    if start < end:
        retrying(url, f"bytes {start} to {end}", retry, once)
    return bytes(data)


def fetch(url: str, size: int, to: Path, version: str = "", retry: Retry = Retry()) -> None:
    """Copy a remote file of `size` bytes to `to`, completely or not at all.

    Raises:
        GigabatchError: as `retrying`, or if the file has a different size or version.
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

    Raises:
        GigabatchError: as `fetch`.
        OSError: if `file` cannot be written.
    """
    _refuse_changed(shard, retry)
    at = 0
    while at < shard.bytes:
        end = min(at + CHUNK, shard.bytes)

        def once(at: int = at, end: int = end) -> int:
            done = at

            def write(data: bytes) -> None:  # unbuffered, so that a fork cannot repeat it
                nonlocal done
                view = memoryview(data)
                try:
                    while view:
                        count = os.pwrite(file.fileno(), view, done)
                        done, view = done + count, view[count:]
                except OSError as error:
                    raise _DiskError(error) from error

            last = shard.bytes
            return transport.copy_range(shard.url, at, end, last, write, retry.timeout_s)

        at += retrying(shard.url, f"bytes {at} to {end}", retry, once)
    os.fsync(file.fileno())
    _refuse_changed(shard, retry)  # otherwise part of the copy may be old and part new


def _refuse_changed(shard: ShardState, retry: Retry) -> None:
    now = stat(shard.url, retry)
    if now.bytes != shard.bytes or (shard.version and now.version != shard.version):
        raise GigabatchError(
            f"{shard.url}: changed after it was indexed: {now.bytes} bytes, version "
            f"{now.version or 'unknown'}; it was {shard.bytes} bytes, version "
            f"{shard.version or 'unknown'}. Restore the old file, or index the set again."
        )


def retrying(url: str, what: str, retry: Retry, once: Callable[[], T], done: str = "read") -> T:
    """Call `once`, and repeat it after failures with increasing waits.

    Args:
        url: The file, for messages.
        what: Subject of messages, such as "its size".
        retry: Limits of the request.
        once: Makes one attempt.
        done: Participle for messages: `what` could not be `done`.

    Returns:
        The result of the first attempt that succeeds.

    Raises:
        GigabatchError: after the last attempt; at once if the file is missing, access is denied or
            a package is not installed.
    """
    for attempt in range(1, retry.attempts + 1):
        try:
            return once()
        except GigabatchError:
            raise
        except _DiskError as error:
            raise error.args[0] from None
        except ImportError as error:
            scheme = transport.scheme_of(url)
            raise GigabatchError(
                f"{url}: {scheme}:// needs the package {transport.SCHEMES[scheme]}, which cannot "
                f'be imported ({error}). Install it: pip install "gigabatch[remote]"'
            ) from None
        except Exception as error:
            why = transport.reason(error)
            if transport.is_final(error):
                raise GigabatchError(
                    f"{url}: {what} cannot be {done}: {why}. Check the address, and that the keys "
                    f"set here allow it to be {done}."
                ) from error
            if attempt == retry.attempts:
                raise GigabatchError(
                    f"{url}: {what} could not be {done} in {attempt} attempts; the last error: "
                    f"{why}. Check the server and the network, then start again."
                ) from error
            wait = retry.wait_s(attempt, url)
            log.warning(
                "%s: %s, attempt %d of %d failed: %s; retrying in %.1f s",
                url, what, attempt, retry.attempts, why, wait,
            )  # fmt: skip
            time.sleep(wait)
    raise ValueError(f"attempts must be at least 1, not {retry.attempts}")


def write(path: Path, url: str, new: bool = False, retry: Retry = Retry()) -> None:
    """Write a local file to `url`, completely or not at all.

    Raises:
        FileTaken: if `new` and the file exists, perhaps from an earlier attempt whose response was
            lost.
        GigabatchError: as `retrying`.
    """

    def once() -> None:
        try:
            transport.put(path, url, new, retry.timeout_s)
        except FileExistsError as error:
            raise FileTaken(f"{url}: the file exists already.") from error

    retrying(url, "the file", retry, once, "written")


def remove(url: str, retry: Retry = Retry()) -> None:
    """Remove a file if it exists.

    Raises:
        GigabatchError: as `retrying`.
    """
    retrying(url, "the file", retry, lambda: transport.remove(url, retry.timeout_s), "removed")


def find(url: str, retry: Retry = Retry()) -> dict[str, ShardState]:
    """Return the state of every file below a folder, by path relative to the folder.

    Raises:
        GigabatchError: as `retrying`.
    """
    files = entries(url, retry, recursive=True)
    return {name.removeprefix(f"{url}/"): as_state(name, info) for name, info in files.items()}


def read_text(url: str, retry: Retry = Retry()) -> str | None:
    """Return the text of a small file; None if the file does not exist.

    Raises:
        GigabatchError: as `retrying`.
    """

    def size() -> int | None:
        try:
            return as_state(url, transport.info(url, retry.timeout_s)).bytes
        except FileNotFoundError:
            return None

    count = retrying(url, "the file", retry, size)
    return None if count is None else read_range(url, 0, count, retry).decode()


def check_writable(url: str, retry: Retry = QUICK) -> None:
    """Check a folder by writing, reading and removing a file.

    Raises:
        GigabatchError: if one of these fails.
    """
    name = f".probe-{platform.node()}-{uuid.uuid4().hex}"
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(name)
        file.flush()
        write(Path(file.name), f"{url}/{name}", retry=retry)
    try:
        if read_text(f"{url}/{name}", retry) != name:
            raise GigabatchError(f"{url}: a file written there reads back differently.")
    finally:
        remove(f"{url}/{name}", retry)
