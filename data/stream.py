"""The stream of micro-batches: a `webdataset.DataPipeline` whose source stage is ours.

The source yields the samples of this rank's micro-batches in order; the stages behind it decode;
the last one collates. A user's own webdataset stages go between, one sample in, one sample out.
The only state is the step at which the stream starts.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from gigabatch.data import order as ordering
from gigabatch.data.decode import (
    IMAGE_MEMBERS,
    ImageSettings,
    decode_column,
    decode_image,
    decode_text,
)
from gigabatch.data.errors import GigabatchError
from gigabatch.data.index import Index
from gigabatch.data.keyed import key
from gigabatch.data.order import Order
from gigabatch.data.reader import Reader
from gigabatch.data.tokenizer import encode

Sample = dict[str, Any]
Stage = Callable[[Iterator[Sample]], Iterator[Sample]]


@dataclass(frozen=True)
class MicroBatch:
    """The unit of everything: rows that pass the towers together.

    `step`, `number`: its name in the run; with the run's seed they key all its randomness.
    `tensors`: `image` uint8 [B, C, H, W]; `text` int64 [B, L] with `text_mask` bool [B, L];
    `sample` int64 [B]; and a column int64 [B] for each that was asked for. `keys`: the samples'
    names. `real`: false on padding, which is run through the towers for the sake of the
    collectives and counts for nothing.
    """

    step: int
    number: int
    real: bool
    keys: tuple[str, ...]
    tensors: dict[str, Tensor] = field(repr=False)

    def to(self, device: torch.device) -> MicroBatch:
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors.items()}
        return replace(self, tensors=moved)

    def pin_memory(self) -> MicroBatch:
        return replace(self, tensors={name: t.pin_memory() for name, t in self.tensors.items()})


@dataclass(frozen=True)
class Plan:
    """One micro-batch to be read: its name, and its sample numbers."""

    step: int
    number: int
    real: bool
    samples: tuple[int, ...]


@dataclass(frozen=True)
class TrainPlans:
    """This rank's micro-batches of steps `first_step` to `last_step`, dummies included."""

    order: Order
    global_size: int
    micro_size: int
    world_size: int
    rank: int
    first_step: int
    last_step: int

    @property
    def per_step(self) -> int:
        return ordering.rounds(self.global_size // self.micro_size, self.world_size)

    def __iter__(self) -> Iterator[Plan]:
        for step in range(self.first_step, self.last_step + 1):
            samples = ordering.batch_samples(self.order, step, self.global_size)
            yield from _deal(samples, self.micro_size, self.world_size, self.rank, step)


@dataclass(frozen=True)
class EvalPlans:
    """This rank's share of samples 0 to `count` - 1, in order, dummies included; the last real
    micro-batch may be short."""

    count: int
    micro_size: int
    world_size: int
    rank: int

    def __iter__(self) -> Iterator[Plan]:
        samples = np.arange(self.count)
        return _deal(samples, self.micro_size, self.world_size, self.rank, step=0)


def _deal(
    samples: np.ndarray, micro_size: int, world_size: int, rank: int, step: int
) -> Iterator[Plan]:
    count = -(-len(samples) // micro_size)
    mine = ordering.deal(count, world_size, rank)
    for j in mine:
        rows = samples[j * micro_size : (j + 1) * micro_size]
        yield Plan(step, j, True, tuple(rows.tolist()))
    for _ in range(ordering.rounds(count, world_size) - len(mine)):
        # One real sample: batches of size zero crash models and ZeRO.
        yield Plan(step, count, False, (int(samples[0]),))


class MicroBatchSource(IterableDataset[Sample]):
    """The source stage: raw samples of this rank's micro-batches, loader workers interleaved.

    Each micro-batch reseeds torch, numpy and `random`, so that a user's random stage gives the
    same result on any rank and loader worker.
    """

    def __init__(self, index: Index, plans: Iterable[Plan], members: Sequence[str], seed: int):
        self.index, self.plans, self.members, self.seed = index, plans, tuple(members), seed

    def __iter__(self) -> Iterator[Sample]:
        with Reader(self.index) as reader:
            for plan in _share(self.plans):
                _seed_all(key(self.seed, "stage", plan.step, plan.number))
                for sample in plan.samples:
                    yield self._load(reader, sample)

    def _load(self, reader: Reader, sample: int) -> Sample:
        shard = self.index.root / self.index.shards[self.index.shard_of(sample)]
        loaded: Sample = {name: reader.read(sample, name) for name in self.members}
        return loaded | {
            "__key__": self.index.key(sample), "__url__": str(shard), "__sample__": sample
        }  # fmt: skip


def _share(plans: Iterable[Plan]) -> Iterator[Plan]:
    """Every n-th plan, in one of n loader workers; they take turns, so order is kept."""
    worker = get_worker_info()
    offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
    return islice(plans, offset, None, stride)


def _leave_signals_to_parent(worker: int) -> None:
    """A forked loader would run its parent's handlers: Ctrl-C is the parent's to answer, and
    SIGTERM is how the parent ends a loader."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed % (1 << 63))
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


@dataclass(frozen=True)
class Decode:
    """Raw members to `image` and `text`, and the asked-for columns of the json member."""

    image_member: str | None
    text_member: str | None
    images: ImageSettings
    columns: tuple[str, ...]

    def __call__(self, sample: Sample) -> Sample:
        where = f"{sample['__url__']}: sample {sample['__key__']!r}"
        out = {name: value for name, value in sample.items() if name.startswith("__")}
        if self.image_member:
            out["image"] = decode_image(sample[self.image_member], self.images, where)
        if self.text_member:
            out["text"] = decode_text(sample[self.text_member], where)
        for column in self.columns:
            out[column] = decode_column(sample["json"], column, where)
        return out


@dataclass(frozen=True)
class Collate:
    """Groups samples into the MicroBatches of `plans` and tokenises, a batch at a time."""

    plans: Iterable[Plan]
    tokenizer_json: str
    columns: tuple[str, ...]

    def __call__(self, samples: Iterator[Sample]) -> Iterator[MicroBatch]:
        tokenizer, samples = Tokenizer.from_str(self.tokenizer_json), iter(samples)
        for plan in _share(self.plans):
            rows = list(islice(samples, len(plan.samples)))
            # Compared with the plan, so that a stage cannot even lose a whole micro-batch unseen.
            if tuple(row.get("__sample__") for row in rows) != plan.samples:
                raise GigabatchError(
                    "a data stage dropped, repeated or moved samples (micro-batch "
                    f"{plan.number} of step {plan.step}). Stages must return each sample once, in "
                    "order; filter when the shards are written instead."
                )
            yield self._stack(plan, rows, tokenizer)

    def _stack(self, plan: Plan, rows: list[Sample], tokenizer: Tokenizer) -> MicroBatch:
        tensors = {"sample": torch.tensor([row["__sample__"] for row in rows])}
        for column in self.columns:
            tensors[column] = torch.tensor([row[column] for row in rows], dtype=torch.int64)
        if "image" in rows[0]:
            tensors["image"] = torch.stack([row["image"] for row in rows])
        if "text" in rows[0]:
            captions = [row["text"] for row in rows]
            tensors["text"], tensors["text_mask"] = encode(tokenizer, captions)
        keys = tuple(row["__key__"] for row in rows)
        return MicroBatch(plan.step, plan.number, plan.real, keys, tensors)


@dataclass(frozen=True)
class Failure:
    """What a user must put right, on its way out of a loader worker."""

    message: str


def _catch(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch | Failure]:
    # Raised in a loader worker, an error would come out with a traceback for its message.
    try:
        yield from batches
    except GigabatchError as error:
        yield Failure(str(error))


def _release(batches: Iterator[MicroBatch | Failure]) -> Iterator[MicroBatch]:
    for batch in batches:
        if isinstance(batch, Failure):
            del batches  # else the traceback would keep the loader's workers alive
            raise GigabatchError(batch.message)
        yield batch


def open_stream(
    index: Index,
    plans: Iterable[Plan],
    *,
    images: ImageSettings,
    tokenizer: Path,
    columns: Sequence[str],
    seed: int,
    workers: int,
    prefetch: int,
    stages: Sequence[Stage] = (),
    pin_memory: bool = False,
) -> wds.DataPipeline:
    """The micro-batches of `plans`, in order, read by `workers` processes (0: in this one).

    `plans` must allow more than one pass. `prefetch`: micro-batches each loader worker keeps
    ready. `columns`: fields of the json member to bring along. `stages`: ordinary webdataset
    stages, from decoded sample to decoded sample.
    Raises GigabatchError where samples lack an image or a caption; iterating raises it for what
    cannot be read or decoded.
    """
    image, text = index.require(*IMAGE_MEMBERS), index.require("txt")
    members = [image, text] + ([index.require("json")] if columns else [])
    source = MicroBatchSource(index, plans, members, seed)
    pipeline = wds.DataPipeline(
        source,
        wds.map(Decode(image, text, images, tuple(columns)), handler=wds.reraise_exception),
        *stages,
        Collate(plans, tokenizer.read_text(), tuple(columns)),
        _catch,
    )
    loader = wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
    )
    return loader.compose(_release)


def captions(index: Index, limit: int) -> Iterator[str]:
    """The captions of at most `limit` samples, evenly spaced: what a tokeniser is trained on."""
    member = index.require("txt")
    step = -(-len(index) // limit)
    with Reader(index) as reader:
        for sample in range(0, len(index), step):
            where = f"sample {index.key(sample)!r} of {index.root}"
            yield decode_text(reader.read(sample, member), where)


def by_step(stream: Iterable[MicroBatch], per_step: int) -> Iterator[list[MicroBatch]]:
    """Group a rank's micro-batches by step."""
    iterator = iter(stream)
    for first in iterator:
        rest = (next(iterator) for _ in range(per_step - 1))
        yield list(chain([first], rest))
