"""Damaged samples in a stream: equal substitutes on all ranks, records, counts, limits."""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import spoil
from tarfiles import overwrite

from gigabatch.data.decode.fields import Fields, captions_for_tokenizer
from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.assignment import TrainPlans
from gigabatch.data.order.epoch_order import ShuffledOrder
from gigabatch.data.order.mixture import Mixture, Phase
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.quarantine import check_damage_rate, substitute_row
from gigabatch.data.shards.scan import IndexSettings
from gigabatch.data.stream import MicroBatch, open_stream
from gigabatch.data.text.captions import CaptionSettings
from gigabatch.data.text.tokenizer import TextSettings, train_bpe

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
FIELDS = Fields(ImageSettings(size=8), CaptionSettings(), columns=("concept",))
DAMAGED = (30, 77, 150)


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Iterator[Path]:
    for shard in (shards / "train").glob("*.tar"):
        shutil.copy2(shard, tmp_path / shard.name)
    yield tmp_path
    gc.collect()  # a traceback may keep loader workers alive, which would exit during another test


def read(index: Index, world_size: int = 1, workers: int = 0, steps: int = 5) -> list[MicroBatch]:
    tokenizer = index.folder / "tokenizer.json"
    if not tokenizer.exists():
        bpe = train_bpe(
            captions_for_tokenizer([index], FIELDS, 99), TextSettings(vocab_size=300, length=8)
        )
        bpe.save(str(tokenizer))
    mixture = Mixture((ShuffledOrder(index.shard_sizes, 5, 2),), (Phase(0, (1.0,)),), 5)
    batches = []
    for rank in range(world_size):
        plans = TrainPlans(mixture, 40, 5, world_size, rank, 1, steps)
        batches += open_stream(
            [index], plans, fields=FIELDS, tokenizer=tokenizer, seed=5, workers=workers, prefetch=2
        )
    return sorted((b for b in batches if b.real), key=lambda b: (b.step, b.number))


def test_substitutes_are_equal_for_any_world_size_and_workers(
    folder: Path,
) -> None:
    index = open_index(folder)
    intact = read(index)
    for sample in DAMAGED:
        spoil(index, sample)
    assert open_index(folder) == index  # damage shows only when the shard is read
    batches = read(index)
    records = [record for batch in batches for record in batch.substitutions]
    # Five steps of 40 samples are one epoch.
    assert sorted(record.sample for record in records) == list(DAMAGED)
    for record in records:
        shard = folder / f"train-{record.sample // 50:03d}.tar"
        offset = index.member_span(record.sample, "png")[0]
        location = f"{shard}: at byte {offset}: member .png of sample {record.key!r}"
        assert record.why.startswith(location)
        assert record.key == f"s{record.sample:05d}"
        assert record.substitute not in DAMAGED
    for before, after in zip(intact, batches, strict=True):
        substitutes = {record.sample: record.substitute for record in after.substitutions}
        numbers = before.tensors["sample"].tolist()
        expected = [substitutes.get(number, number) for number in numbers]
        assert after.tensors["sample"].tolist() == expected
        assert after.tensors["concept"].tolist() == [number % 50 for number in expected]
        assert after.keys == tuple(f"s{number:05d}" for number in expected)
    for world_size, workers in [(1, 1), (1, 3), (3, 0), (5, 2)]:
        repeated = read(index, world_size, workers)
        assert [b.substitutions for b in repeated] == [b.substitutions for b in batches]
        for a, b in zip(repeated, batches, strict=True):
            assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize("member", ["png", "txt", "json"])
def test_damage_in_any_read_member_is_recorded(folder: Path, member: str) -> None:
    index = open_index(folder)
    spoil(index, 30, member, at=2)
    records = [record for batch in read(index) for record in batch.substitutions]
    assert [record.sample for record in records] == [30]
    assert f"member .{member} of sample 's00030'" in records[0].why
    assert "CRC-32C" in records[0].why


def test_undecodable_sample_is_replaced_without_checksums(folder: Path) -> None:
    index = open_index(folder, settings=IndexSettings(checksums=False))
    path, (offset, _) = Path(index.shards[0].name), index.member_span(30, "png")
    overwrite(path, offset + 20, bytes(100))
    records = [record for batch in read(index) for record in batch.substitutions]
    assert [record.sample for record in records] == [30]
    assert "cannot be decoded" in records[0].why


def test_damaged_substitute_is_skipped(folder: Path) -> None:
    index = open_index(folder)
    first = substitute_row(5, 30, 0, len(index))
    assert first != 30
    for sample in (30, first):
        spoil(index, sample)
    substitutes = {
        record.sample: record.substitute for batch in read(index) for record in batch.substitutions
    }
    assert substitutes[30] == substitute_row(5, 30, 1, len(index))
    assert set(substitutes) == {30, first}


def test_set_with_only_damaged_samples_raises(folder: Path) -> None:
    index = open_index(folder)
    for sample in range(len(index)):
        spoil(index, sample)
    with pytest.raises(GigabatchError, match="the set is not what was indexed"):
        read(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_truncated_during_run_raises(folder: Path, workers: int) -> None:
    """With much of the shard missing, substitutes would silently change the data."""
    index = open_index(folder)
    path = Path(index.shards[1].name)
    os.truncate(path, index.member_span(77, "png")[0] + 3)
    with pytest.raises(GigabatchError) as error:
        read(index, workers=workers)
    assert re.match(
        rf"{path}: at byte \d+: member .* of sample 's000\d\d' is truncated", str(error.value)
    )


def test_shard_removed_during_run_raises(folder: Path) -> None:
    index = open_index(folder)
    Path(index.shards[2].name).unlink()
    with pytest.raises(GigabatchError, match=r"train-002\.tar: the shard cannot be read"):
        read(index)


@pytest.mark.parametrize(
    ("damaged", "samples", "raises"),
    [(1, 10, False), (10, 100, False), (11, 100, True), (10, 10_000, False), (11, 10_000, True),
     (100, 100_000, False), (101, 100_000, True)],
)  # fmt: skip
def test_check_damage_rate_raises_above_limit(damaged: int, samples: int, raises: bool) -> None:
    try:
        check_damage_rate({0: 0, 1: damaged}, {0: 5, 1: samples}, {0: "one", 1: "two"}, 0.001)
    except GigabatchError as error:
        assert raises
        assert str(error).startswith(f"two: {damaged} of {samples:,} samples")  # noqa: PT017
    else:
        assert not raises
