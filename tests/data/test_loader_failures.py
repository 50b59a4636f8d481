"""Loader workers that are killed, or run out of shared memory or open files: one message, soon."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gigabatch.data.decode.fields import Fields
from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.loader_errors import LoaderError
from gigabatch.data.order.assignment import EvalPlans
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.stream import open_stream

PROBE = Path(__file__).with_name("loader_probe.py")


def small_stream(shards: Path, *stages: Any) -> Any:
    index = open_index(shards / "train")
    return open_stream(
        [index], EvalPlans(len(index), 1, 1, 0), fields=Fields(ImageSettings(size=8)),
        tokenizer=None, seed=1, workers=1, prefetch=2, stages=stages,
    )  # fmt: skip


class _Unpicklable:
    def __reduce__(self) -> str:
        raise TypeError("no pickle of this")


def add_unpicklable_key(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        yield sample | {"__key__": _Unpicklable()}


def test_batch_that_cannot_be_sent_raises_instead_of_hanging(shards: Path) -> None:
    with pytest.raises(LoaderError, match="no pickle of this"):
        list(small_stream(shards, add_unpicklable_key))
    gc.collect()


def probe(shards: Path, *arguments: int, prefix: tuple[str, ...] = ()) -> str:
    """Return how reading ends; at most 30 s."""
    command = [*prefix, sys.executable, str(PROBE), str(shards / "train"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    message, duration = done.stdout.splitlines()
    assert int(duration.split()[1]) < 30
    return message


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, ", usually because the machine ran out of memory"),  # torch may not know
        pytest.param(
            signal.SIGSEGV, "data.workers=0 reads in the training process", marks=pytest.mark.slow
        ),
        pytest.param(signal.SIGABRT, "died of a signal (Aborted)", marks=pytest.mark.slow),
    ],
)
def test_killed_loader_worker_is_one_message(
    shards: Path, number: signal.Signals, words: str
) -> None:
    message = probe(shards, 16, 1, 2, 0, number)
    assert message.startswith("LostProcess: loader worker ")
    assert words in message
    assert "data.workers" in message


@pytest.mark.slow
@pytest.mark.parametrize("open_files", [40, 100])
def test_too_few_open_files_name_the_limit(shards: Path, open_files: int) -> None:
    message = probe(shards, 16, 2, 8, open_files, 0)
    assert message.startswith(
        f"GigabatchError: too many open files: this process may open {open_files} "
    )
    assert "Set `ulimit -n 4096`" in message


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize(("size", "room"), [(256, "1m")])
def test_full_shared_memory_is_named(shards: Path, size: int, room: str) -> None:
    mount = f'mount -t tmpfs -o size={room} none /dev/shm; exec "$@"'
    message = probe(shards, size, 2, 4, 0, 0, prefix=("unshare", "-m", "sh", "-c", mount, "sh"))
    assert message.startswith("GigabatchError: /dev/shm has no room for the micro-batches")
    assert "--shm-size" in message
