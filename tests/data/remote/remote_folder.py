"""A remote folder on a server that fails on purpose."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from servers import FailingServer, upload

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.access import Retry

SIZES = {"s0.tar": 20_000, "s1.tar": 3_000, "s2.tar": 1}
QUICK = Retry(attempts=3, first_wait_s=0.01, timeout_s=5)
SHORT = Retry(attempts=3, first_wait_s=0.01, timeout_s=1.0)
NUMBERS = itertools.count()  # numbers of buckets; all S3 servers of a process share their buckets


class RemoteFolder(NamedTuple):
    """A remote folder, its server, and the local folder with the same files."""

    url: str
    server: FailingServer
    folder: Path


def write(remote: RemoteFolder, name: str, data: bytes) -> None:
    """Write or replace a file on the server."""
    (remote.folder / name).write_bytes(data)
    if remote.url.startswith("s3://"):
        upload(remote.server, remote.folder, *remote.url.removeprefix("s3://").split("/", 1))


def error_message(call: Callable[..., object], *arguments: object, **options: object) -> str:
    """Return the message of the GigabatchError that a call raises; it must be one line."""
    with pytest.raises(GigabatchError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def urls(remote: RemoteFolder, *names: str) -> list[str]:
    return [f"{remote.url}/{name}" for name in names or sorted(SIZES)]
