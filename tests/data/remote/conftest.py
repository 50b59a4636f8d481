from __future__ import annotations

import random
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from caching import NAMES, content
from far import NUMBERS, SIZES, Far
from servers import FailingServer, s3_server, upload, web_server

from gigabatch.data.remote.places import stat_all
from gigabatch.data.remote.ranges import ShardState


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
def site(folder: Path) -> Iterator[Far]:
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


@pytest.fixture(params=["site", pytest.param("s3", marks=pytest.mark.slow)])
def far(request: pytest.FixtureRequest) -> Far:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Far)
    return found


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FailingServer]:
    folder = tmp_path / "far"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(content(name))
    with web_server(folder) as server:
        yield server


@pytest.fixture
def states(web: FailingServer) -> list[ShardState]:
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
