from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tarfiles import write_tar

from gigabatch.data.decode.fields import Fields, Sample, captions_for_tokenizer
from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.assignment import EvalPlans, MicroBatchPlan, TrainPlans
from gigabatch.data.order.epoch_order import ShuffledOrder
from gigabatch.data.order.mixture import Mixture, Phase, batch_sample_numbers
from gigabatch.data.rng import key
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.stream import MicroBatch, group_by_step, open_stream
from gigabatch.data.text.captions import CaptionSettings
from gigabatch.data.text.tokenizer import TextSettings, train_bpe

# The tests use three loader workers, which warns on a machine with two cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
GLOBAL, MICRO = 24, 4
FIELDS = Fields(ImageSettings(size=8), CaptionSettings(), columns=("concept", "colour"))


@pytest.fixture(scope="module")
def index(shards: Path) -> Index:
    return open_index(shards / "train")


@pytest.fixture(scope="module")
def tokenizer(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(
        captions_for_tokenizer([index], FIELDS, 1000), TextSettings(vocab_size=300, length=12)
    ).save(str(path))
    return path


@pytest.fixture
def stream(index: Index, tokenizer: Path) -> Iterator[Callable[..., list[MicroBatch]]]:
    def read(plans: Any, workers: int = 0, stages: Sequence[Any] = ()) -> list[MicroBatch]:
        opened = open_stream(
            [index], plans, fields=FIELDS, tokenizer=tokenizer, seed=5, workers=workers, prefetch=2,
            stages=stages,
        )  # fmt: skip
        return list(opened)

    yield read
    gc.collect()  # a traceback may keep loader workers alive, which would exit during another test


def plans(
    index: Index, world_size: int = 1, rank: int = 0, first: int = 1, last: int = 3
) -> TrainPlans:
    order = ShuffledOrder(index.shard_sizes, seed=5, window=2)
    mixture = Mixture((order,), (Phase(0, (1.0,)),), seed=5)
    return TrainPlans(mixture, GLOBAL, MICRO, world_size, rank, first, last)


def assert_equal(one: Sequence[MicroBatch], two: Sequence[MicroBatch]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a.step, a.number, a.real, a.keys) == (b.step, b.number, b.real, b.keys)
        assert a.tensors.keys() == b.tensors.keys()
        for name in a.tensors:
            assert torch.equal(a.tensors[name], b.tensors[name]), name


def test_micro_batches_match_shards(index: Index, stream: Callable[..., list[MicroBatch]]) -> None:
    batches = stream(plans(index))
    assert [(b.step, b.number) for b in batches] == [(s, j) for s in (1, 2, 3) for j in range(6)]
    for step in (1, 2, 3):
        rows = torch.cat([b.tensors["sample"] for b in batches if b.step == step])
        assert rows.tolist() == batch_sample_numbers(plans(index).mixture, step, GLOBAL).tolist()
    for batch in batches:
        assert batch.real
        tensors, samples = batch.tensors, batch.tensors["sample"].tolist()
        assert set(tensors) == {"sample", "concept", "colour", "image", "text", "text_mask"}
        assert batch.keys == tuple(index.key(s) for s in samples)
        # support.write_samples gives sample s concept s % 50.
        assert tensors["concept"].tolist() == [s % 50 for s in samples]
        assert (tensors["colour"] == color_codes(tensors["concept"])).all()
        assert tensors["image"].shape == (MICRO, 3, 8, 8)
        assert tensors["image"].dtype == torch.uint8
        assert tensors["text"].shape == tensors["text_mask"].shape == (MICRO, 12)


def color_codes(concepts: torch.Tensor) -> torch.Tensor:
    return torch.tensor([key("column", f'"shade {c}"') >> 1 for c in concepts.tolist()])


@pytest.mark.parametrize("workers", [1, 3])
def test_stream_is_equal_for_any_number_of_workers(
    workers: int, index: Index, stream: Callable[..., list[MicroBatch]]
) -> None:
    assert_equal(stream(plans(index), workers=workers), stream(plans(index)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_ranks_partition_the_global_batch(
    world_size: int, index: Index, stream: Callable[..., list[MicroBatch]]
) -> None:
    expected = stream(plans(index))
    ranks = [stream(plans(index, world_size, rank)) for rank in range(world_size)]
    per_step = plans(index, world_size).per_step
    # Every rank has the same number of micro-batches in every step, so collectives match.
    for rank in ranks:
        assert [b.step for b in rank] == [s for s in (1, 2, 3) for _ in range(per_step)]
    real = [b for rank in ranks for b in rank if b.real]
    assert_equal(sorted(real, key=lambda b: (b.step, b.number)), expected)
    first_keys = expected[0].keys + expected[6].keys + expected[12].keys
    for padding in (b for rank in ranks for b in rank if not b.real):
        assert len(padding.keys) == len(padding.tensors["image"]) == 1
        assert padding.number == GLOBAL // MICRO  # no real micro-batch has this number
        assert padding.keys[0] in first_keys


def test_stream_from_later_step_matches_skipping(
    index: Index, stream: Callable[..., list[MicroBatch]]
) -> None:
    late = stream(plans(index, first=8, last=10))  # step 9 straddles two epochs
    assert_equal(late, stream(plans(index, first=1, last=10))[-len(late) :])


def test_group_by_step_returns_lists_of_one_step(
    index: Index, stream: Callable[..., list[MicroBatch]]
) -> None:
    rank_plans = plans(index, world_size=4, rank=1)
    steps = list(group_by_step(stream(rank_plans), rank_plans.per_step))
    assert [[b.step for b in step] for step in steps] == [[1, 1], [2, 2], [3, 3]]


class Noise:
    """A user's random stage that uses all three generators."""

    def __call__(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            shift = random.randrange(50) + np.random.randint(50) + int(torch.randint(50, ()))
            yield sample | {"image": (sample["image"].int() + shift).clamp(max=255).byte()}


def test_random_user_stage_is_equal_for_any_workers_and_ranks(
    index: Index, stream: Callable[..., list[MicroBatch]]
) -> None:
    clean, noisy = stream(plans(index)), stream(plans(index), stages=[Noise()])
    shifts = [
        (a.tensors["image"].int() - b.tensors["image"].int()).amax((1, 2, 3)).tolist()
        for a, b in zip(noisy, clean, strict=True)
    ]
    assert len({shift for row in shifts for shift in row}) > 20
    assert len({tuple(row) for row in shifts}) == len(shifts)
    for workers in (1, 3):
        assert_equal(stream(plans(index), workers=workers, stages=[Noise()]), noisy)
    rank_1 = [b for b in stream(plans(index, 3, 1), stages=[Noise()]) if b.real]
    assert_equal(rank_1, [b for b in noisy if b.number in (2, 3)])


def drop_one(samples: Iterator[Sample]) -> Iterator[Sample]:
    yield from (sample for i, sample in enumerate(samples) if i != 6)


def drop_a_micro_batch(samples: Iterator[Sample]) -> Iterator[Sample]:
    yield from (sample for i, sample in enumerate(samples) if i // MICRO != 1)


def drop_the_last(samples: Iterator[Sample]) -> Iterator[Sample]:
    previous = None
    for sample in samples:
        if previous is not None:
            yield previous
        previous = sample


def repeat(samples: Iterator[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        yield sample


def swap(samples: Iterator[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield next(samples)
        yield sample


def drop_all(samples: Iterator[Sample]) -> Iterator[Sample]:
    yield from [s for s in samples if False]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "stage", [drop_one, drop_a_micro_batch, drop_the_last, repeat, swap, drop_all]
)
def test_stage_that_drops_repeats_or_moves_samples_raises(
    stage: Any, workers: int, index: Index, stream: Callable[..., list[MicroBatch]]
) -> None:
    with pytest.raises(GigabatchError, match="a stage dropped, repeated or moved") as error:
        stream(plans(index), workers=workers, stages=[stage])
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


def test_micro_batches_before_stage_error_are_yielded(index: Index, tokenizer: Path) -> None:
    opened = open_stream(
        [index], plans(index), fields=FIELDS, tokenizer=tokenizer, seed=5, workers=2, prefetch=2,
        stages=[drop_the_last],
    )  # fmt: skip
    iterator = iter(opened)
    first = [next(iterator) for _ in range(16)]
    assert [(b.step, b.number) for b in first[-2:]] == [(3, 2), (3, 3)]
    with pytest.raises(GigabatchError, match="micro-batch 4 of step 3"):
        next(iterator)


def test_exception_in_user_stage_keeps_its_type(
    index: Index, stream: Callable[..., list[MicroBatch]]
) -> None:
    def fail(samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            yield sample | {"image": 1 // 0}

    with pytest.raises(ZeroDivisionError):
        stream(plans(index), stages=[fail])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x", "a.json": b"{}"}, "no sample has a .png or .jpg"),
        ({"a.png": b"x", "a.json": b"{}"}, "no sample has a .txt"),
        ({"a.png": b"x", "a.txt": b"x"}, "no sample has a .json"),
    ],
)
def test_set_without_required_members_raises_on_open(
    members: dict[str, bytes], message: str, tmp_path: Path, tokenizer: Path
) -> None:
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(GigabatchError) as error:
        open_stream(
            [open_index(tmp_path)], [], fields=FIELDS, tokenizer=tokenizer, seed=0, workers=0,
            prefetch=1,
        )  # fmt: skip
    assert message in str(error.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 60])
@pytest.mark.parametrize("count", [1, 7, 8, 50, 200])
def test_eval_plans_cover_every_sample_once(count: int, world_size: int) -> None:
    ranks = [list(EvalPlans(count, 8, world_size, rank)) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    real = [sample for rank in ranks for plan in rank if plan.real for sample in plan.samples]
    assert real == list(range(count))
    assert all(plan == MicroBatchPlan(0, -(-count // 8), False, (0,))
               for rank in ranks for plan in rank if not plan.real)  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_last_eval_micro_batch_may_be_short(
    workers: int, index: Index, stream: Callable[..., list[MicroBatch]]
) -> None:
    batches = stream(EvalPlans(len(index), 64, 1, 0), workers=workers)
    assert [len(b.keys) for b in batches] == [64, 64, 64, 8]
    assert torch.cat([b.tensors["sample"] for b in batches]).tolist() == list(range(200))


@pytest.mark.parametrize(("limit", "count"), [(1000, 200), (200, 200), (50, 50), (60, 50), (1, 1)])
def test_captions_for_tokenizer_are_evenly_spaced(limit: int, count: int, index: Index) -> None:
    captions = list(captions_for_tokenizer([index], FIELDS, limit))
    assert len(captions) == count <= limit
