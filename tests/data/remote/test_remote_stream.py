"""Training data from servers that fail on purpose: batches equal those of a local folder."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import FailingServer, s3_server, upload, web_server
from tarfiles import overwrite
from test_quarantine import FIELDS
from test_stream import assert_equal

from gigabatch.data.decode.fields import captions_for_tokenizer
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.assignment import TrainPlans
from gigabatch.data.order.epoch_order import ShuffledOrder
from gigabatch.data.order.mixture import Mixture, Phase
from gigabatch.data.remote.access import Retry
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.reader import Reader
from gigabatch.data.stream import MicroBatch, open_stream
from gigabatch.data.text.tokenizer import TextSettings, train_bpe

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
RETRY = Retry(attempts=5, first_wait_s=0.01, timeout_s=1.0)


@contextmanager
def web(folder: Path) -> Iterator[tuple[FailingServer, str]]:
    with web_server(folder) as server:
        yield server, f"{server.url}/train-{{000..003}}.tar"


@contextmanager
def s3(folder: Path) -> Iterator[tuple[FailingServer, str]]:
    with s3_server() as server:
        upload(server, folder, "bucket", "set")
        yield server, "s3://bucket/set/train-*.tar"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GIGABATCH_CACHE", str(tmp_path / "cache"))
    yield
    # End loader workers that a traceback keeps alive; else they would exit during another test.
    gc.collect()


@pytest.fixture
def tokenizer(shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    captions = captions_for_tokenizer([open_index(shards / "train")], FIELDS, 99)
    train_bpe(captions, TextSettings(vocab_size=300, length=8)).save(str(path))
    return path


def read(index: Index, tokenizer: Path, cache: ShardCache, workers: int) -> list[MicroBatch]:
    mixture = Mixture((ShuffledOrder(index.shard_sizes, 5, 2),), (Phase(0, (1.0,)),), 5)
    plans = TrainPlans(mixture, 40, 5, 1, 0, 1, 6)
    return list(
        open_stream(
            [index], plans, fields=FIELDS, tokenizer=tokenizer, seed=5, workers=workers,
            prefetch=2, cache=cache,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("serve", "workers"),
    [(web, 0), (web, 2), (s3, 2), pytest.param(s3, 0, marks=pytest.mark.slow)],
)
def test_batches_from_failing_server_equal_local_batches(
    serve: Any,
    workers: int,
    shards: Path,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    local = open_index(shards / "train")
    with serve(shards / "train") as (server, pattern):
        index = open_index(pattern)
        assert index.digest == local.digest
        server.requests.clear()
        server.status(500, path="*train-000.tar", times=2)
        server.hang_up(path="*train-001.tar", times=2)
        server.stall(5, path="*train-002.tar", times=1)
        server.status(503, path="*train-003.tar", times=3)
        cache = ShardCache(tmp_path / "shards", 1 << 30, RETRY)
        batches = read(index, tokenizer, cache, workers)
        counts = {i: server.count("GET", f"*train-00{i}.tar") for i in range(4)}
        second_pass = read(index, tokenizer, cache, workers)
        assert counts == {i: server.count("GET", f"*train-00{i}.tar") for i in range(4)}
    expected = read(local, tokenizer, cache, 0)
    assert_equal(batches, expected)
    assert_equal(second_pass, expected)
    keys = [key for batch in batches for key in batch.keys][:200]
    assert len(set(keys)) == 200  # five steps of 40 are one epoch
    assert counts[0] >= 3 <= counts[1]  # the requests failed and were repeated


def test_permanent_server_error_ends_the_stream_with_the_reason(
    shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with web(shards / "train") as (server, pattern):
        index = open_index(pattern)
        server.status(500, path="*train-002.tar")
        cache = ShardCache(tmp_path / "shards", 1 << 30, RETRY)
        with pytest.raises(GigabatchError) as error:
            read(index, tokenizer, cache, workers=1)
    message = str(error.value)
    assert f"{server.url}/train-002.tar" in message
    assert "500" in message
    assert "\n" not in message


def test_replaced_remote_shard_changes_the_index(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    for shard in (shards / "train").glob("*.tar"):
        (folder / shard.name).write_bytes(shard.read_bytes())
    with web(folder) as (_, pattern):
        before = open_index(pattern)
        (folder / "train-001.tar").write_bytes((folder / "train-002.tar").read_bytes())
        assert open_index(pattern).digest != before.digest
        (folder / "train-001.tar").unlink()
        with pytest.raises(GigabatchError, match=r"train-001\.tar"):
            open_index(pattern)


def test_damaged_local_copy_is_fetched_again(shards: Path, tmp_path: Path) -> None:
    with web(shards / "train") as (_, pattern):
        index = open_index(pattern)
        cache = ShardCache(tmp_path / "shards", 1 << 30, RETRY)
        with Reader(index, cache) as reader:
            original = reader.read(7, "png")
        (copy,) = cache.folder.glob("*.tar")
        overwrite(copy, index.member_span(7, "png")[0] + 60, b"\0\1\2")
        with Reader(index, cache) as reader:
            assert reader.read(7, "png") == original


def test_indexing_uses_the_cache_argument(shards: Path, tmp_path: Path) -> None:
    with web(shards / "train") as (_, pattern):
        small = ShardCache(tmp_path / "small", 1000, RETRY)
        with pytest.raises(GigabatchError, match=r"data\.cache_gib"):
            open_index(pattern, cache=small)
        other = ShardCache(tmp_path / "other", 1 << 30, RETRY)
        open_index(pattern, cache=other)
        assert len(list(other.folder.glob("*.tar"))) == 4


def test_damaged_remote_shards_are_named_by_url_and_byte(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    complete = (shards / "train" / "train-000.tar").read_bytes()
    (folder / "train-000.tar").write_bytes(complete[:4000])
    (folder / "train-001.tar").write_bytes(b"<html>Please sign in</html>" * 99)
    with web_server(folder) as server, pytest.raises(GigabatchError) as error:
        open_index(f"{server.url}/train-{{000..001}}.tar")
    truncated, page = str(error.value).split("\n")
    assert truncated.startswith(f"{server.url}/train-000.tar: at byte ")
    assert page.startswith(f"{server.url}/train-001.tar: at byte 0: this is not a tar file")
