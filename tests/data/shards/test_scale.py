"""Memory use of a stream over ten million samples."""

from __future__ import annotations

import gc
import json
import os
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from support import write_samples

from gigabatch.data.decode.fields import Fields, captions_for_tokenizer
from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.order.assignment import TrainPlans
from gigabatch.data.order.epoch_order import ShuffledOrder
from gigabatch.data.order.mixture import Mixture, Phase
from gigabatch.data.shards.index import FORMAT, ROWS, Index, index_from_manifest, read_manifest
from gigabatch.data.shards.index_files import write_index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.stream import open_stream
from gigabatch.data.text.captions import CaptionSettings
from gigabatch.data.text.tokenizer import TextSettings, train_bpe

SHARDS, PER_SHARD = 1000, 10_000
LIMIT = 600e6  # bytes of proportional set size per process
FIELDS = Fields(ImageSettings(size=16), CaptionSettings(), columns=("concept",))


def repeated(small: Index, folder: Path) -> Index:
    """Write an index of 10^7 samples that repeats the members of a small set."""
    table = small.table.drop_columns(["key"])

    def pieces() -> list[range]:
        total = SHARDS * PER_SHARD
        return [range(first, min(first + ROWS, total)) for first in range(0, total, ROWS)]

    def rows(piece: range) -> pa.Table:
        numbers = np.arange(piece.start, piece.stop)
        part = table.take(pa.array(numbers % len(small)))
        return part.add_column(0, "key", pa.array(numbers).cast(pa.large_string()))

    name = small.shards[0].name
    shard = {"name": name, "bytes": 1, "version": "", "samples": PER_SHARD, "digest": "d"}
    settings = json.loads(small.settings.model_dump_json())
    manifest = {
        "format": FORMAT, "settings": settings, "shards": [shard] * SHARDS, "digest": "d" * 64,
    }  # fmt: skip
    write_index(map(rows, pieces()), rows(range(1)).schema, manifest, folder)
    return index_from_manifest("large", folder, read_manifest(folder), [name] * SHARDS)


@pytest.mark.slow
def test_stream_over_ten_million_samples_uses_little_memory(tmp_path: Path) -> None:
    write_samples(tmp_path / "small", 100, 100, seed=1)
    small = open_index(tmp_path / "small")
    tokenizer = tmp_path / "tokenizer.json"
    captions = captions_for_tokenizer([small], FIELDS, 100)
    train_bpe(captions, TextSettings(vocab_size=300, length=8)).save(str(tokenizer))
    index = repeated(small, tmp_path / "large")
    assert len(index) == 10**7

    mixture = Mixture((ShuffledOrder(index.shard_sizes, 1, 64),), (Phase(0, (1.0,)),), 1)
    stride = 10**7 // 256 // 200  # 200 batches, spread over an epoch

    class Scattered:
        def __iter__(self):  # type: ignore[no-untyped-def]
            for step in range(1, 200 * stride, stride):
                yield from TrainPlans(mixture, 256, 64, 1, 0, step, step)

    stream = open_stream(
        [index], Scattered(), fields=FIELDS, tokenizer=tokenizer, seed=1, workers=2, prefetch=2
    )
    largest: dict[int, int] = {}
    for number, batch in enumerate(stream):
        assert len(batch.keys) == 64
        if number % 50 == 49:
            # Not psutil's children: they include the resource tracker of other tests.
            for pid in [os.getpid(), *(child.pid or 0 for child in active_children())]:
                pss = psutil.Process(pid).memory_full_info().pss
                largest[pid] = max(largest.get(pid, 0), pss)
    assert len(largest) == 3
    print({pid: f"{pss / 1e6:.0f} MB" for pid, pss in largest.items()})
    assert max(largest.values()) < LIMIT
    del stream
    gc.collect()
