from __future__ import annotations

import random
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from caching import NAMES, content
from remote_folder import NUMBERS, SIZES, RemoteFolder
from servers import FailingServer, s3_server, upload, web_server

from gigabatch.data.remote.access import ShardState
from gigabatch.data.remote.locations import stat_all


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
    """A copy of the files, which a test may change."""
    copy = tmp_path / "remote" / "set"
    copy.mkdir(parents=True)
    for path in set_of_files.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def site(folder: Path) -> Iterator[RemoteFolder]:
    """The folder on a web server."""
    with web_server(folder.parent) as server:
        yield RemoteFolder(f"{server.url}/set", server, folder)


@pytest.fixture(scope="module")
def s3_of_module() -> Iterator[FailingServer]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(folder: Path, s3_of_module: FailingServer) -> RemoteFolder:
    """The folder in a bucket of an S3 server."""
    bucket = f"bucket-{next(NUMBERS)}"
    s3_of_module.clear_rules()
    upload(s3_of_module, folder, bucket, "a/set")
    stat_all([f"s3://{bucket}/a/set/s0.tar"])  # creates the client before tests with short timeouts
    s3_of_module.requests.clear()
    return RemoteFolder(f"s3://{bucket}/a/set", s3_of_module, folder)


@pytest.fixture(params=["site", pytest.param("s3", marks=pytest.mark.slow)])
def remote(request: pytest.FixtureRequest) -> RemoteFolder:
    """The folder on a web server and, in slow tests, on an S3 server."""
    remote = request.getfixturevalue(request.param)
    assert isinstance(remote, RemoteFolder)
    return remote


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FailingServer]:
    """A web server of shards with random content."""
    folder = tmp_path / "remote"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(content(name))
    with web_server(folder) as server:
        yield server


@pytest.fixture
def states(web: FailingServer) -> list[ShardState]:
    """The states of the shards on `web`."""
    states = stat_all([f"{web.url}/{name}" for name in NAMES])
    web.requests.clear()
    return states


@pytest.fixture
def children() -> Iterator[list[BaseProcess]]:
    """A list for the test's processes, which are killed after it."""
    processes: list[BaseProcess] = []
    yield processes
    for process in processes:
        process.kill()
        process.join()
