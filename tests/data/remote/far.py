"""Shards on servers that fail on purpose."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from servers import FailingServer, upload

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.ranges import Retry

SIZES = {"s0.tar": 20_000, "s1.tar": 3_000, "s2.tar": 1}
QUICK = Retry(attempts=3, first_wait_s=0.01, timeout_s=5)
NUMBERS = itertools.count()
IMPATIENT = Retry(attempts=3, first_wait_s=0.01, timeout_s=1.0)


class Far(NamedTuple):
    """A remote folder, the server it lies on, and the local folder that it is a copy of."""

    url: str
    server: FailingServer
    folder: Path


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
