"""Remote files written and removed with patience, and small ones read whole."""

from __future__ import annotations

import platform
import tempfile
import uuid
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote import transport
from gigabatch.data.remote.ranges import Retry, ShardState, as_state, retrying

IMPATIENT = Retry(attempts=2, first_wait_s=0.5, timeout_s=15.0)


class FileTaken(GigabatchError):
    """There is a file already where a new one was to be written."""


def write(path: Path, url: str, new: bool = False, retry: Retry = Retry()) -> None:
    """Write a local file to `url`, which has all of it or nothing.

    Raises FileTaken where `new` and there is something already (also of an earlier try whose
    answer was lost); GigabatchError after the last of `retry.attempts`, at once where it may not
    be written.
    """

    def once() -> None:
        try:
            transport.put(path, url, new, retry.timeout_s)
        except FileExistsError as error:
            raise FileTaken(f"{url}: there is a file already.") from error

    retrying(url, "the file", retry, once, "written")


def remove(url: str, retry: Retry = Retry()) -> None:
    """Remove a file, if it is there. Raises GigabatchError as `write` does."""
    retrying(url, "the file", retry, lambda: transport.remove(url, retry.timeout_s), "removed")


def find(url: str, retry: Retry = Retry()) -> dict[str, ShardState]:
    """Every file below a folder, by its path from there; empty where there is none."""
    found = retrying(url, "its listing", retry, lambda: transport.find(url, retry.timeout_s))
    return {name.removeprefix(f"{url}/"): as_state(name, info) for name, info in found.items()}


def read_text(url: str, retry: Retry = Retry()) -> str | None:
    """The text of a small file; None where there is none."""

    def once() -> str | None:
        try:
            size = as_state(url, transport.info(url, retry.timeout_s)).bytes
        except FileNotFoundError:
            return None
        data = bytearray()
        if size:
            transport.copy_range(url, 0, size, size, data.extend, retry.timeout_s)
        return data.decode()

    return retrying(url, "the file", retry, once)


def check_writable(url: str, retry: Retry = IMPATIENT) -> None:
    """Write a file into the folder `url`, find it there and remove it. Raises GigabatchError."""
    probe = f".probe-{platform.node()}-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe"
        path.write_text(probe)
        write(path, f"{url}/{probe}", retry=retry)
    try:
        if read_text(f"{url}/{probe}", retry) != probe:
            raise GigabatchError(f"{url}: what is written there cannot be read back.")
    finally:
        remove(f"{url}/{probe}", retry)
