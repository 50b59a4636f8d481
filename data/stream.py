"""The stream of micro-batches: a `webdataset.DataPipeline` whose source stage is ours.

The source yields the decoded samples of this rank's micro-batches in order; a user's own
webdataset stages follow, one sample in, one sample out; the last stage collates and tokenises.
The only state is the step at which the stream starts.
"""

from __future__ import annotations

import random
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from gigabatch.data.decode.collate import Collate
from gigabatch.data.decode.fields import Fields, Sample
from gigabatch.data.errors import BadSample, GigabatchError
from gigabatch.data.order.assignment import Plan
from gigabatch.data.order.mixture import number_of
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.rng import key
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.quarantine import ATTEMPTS, Bad, substitute
from gigabatch.data.shards.sources import Sources

Stage = Callable[[Iterator[Sample]], Iterator[Sample]]
AHEAD = 16
"""Micro-batches whose remote shards are fetched before they are needed."""


@dataclass(frozen=True)
class MicroBatch:
    """The unit of everything: rows that pass the towers together.

    `step`, `number`: its name in the run; with the run's seed they key all its randomness.
    `tensors`: `image` uint8 [B, C, H, W]; `text` int64 [B, L] with `text_mask` bool [B, L], of K
    captions a sample [B * K, L]; of the modalities in `more`, a text like those, a vector float32
    [B, size], vectors [B, L, size] with `NAME_mask` bool [B, L], audio [B, T] with `NAME_length`
    int64 [B]; arrays [B, ...]; where modalities may be missing, `image_present` and so on, bool, a
    row of each; `sample` int64 [B]; a column int64 [B] for each that was asked for, of numbers
    float32, of vectors float32 [B, size].
    `keys`: the samples' names. `real`: false on padding, which is run through the towers for the
    sake of the collectives and counts for nothing. `bad`: the samples that others stand in for.
    """

    step: int
    number: int
    real: bool
    keys: tuple[str, ...]
    tensors: dict[str, Tensor] = field(repr=False)
    bad: tuple[Bad, ...] = ()
    more: tuple[str, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors.items()}
        return replace(self, tensors=moved)

    def pin_memory(self) -> MicroBatch:
        return replace(self, tensors={name: t.pin_memory() for name, t in self.tensors.items()})


class MicroBatchSource(IterableDataset[Sample]):
    """The source stage: decoded samples of this rank's micro-batches, loader workers interleaved.

    Each micro-batch reseeds torch, numpy and `random`, so that a user's random stage gives the
    same result on any rank and loader worker.
    """

    def __init__(
        self,
        indexes: Sequence[Index],
        plans: Iterable[Plan],
        fields: Fields,
        seed: int,
        cache: ShardCache | None,
    ) -> None:
        self.indexes, self.plans, self.fields = tuple(indexes), plans, fields
        self.seed, self.cache = seed, cache
        self.members = fields.members(self.indexes)

    def __iter__(self) -> Iterator[Sample]:
        with Sources(self.indexes, self.cache) as sources:
            plans = _share(self.plans)
            for plan in _ahead(plans, sources) if sources.remote else plans:
                _seed_all(key(self.seed, "stage", plan.step, plan.number))
                numbers = np.array(plan.samples, np.int64)
                raws = sources.read(numbers, self.members)
                keys = sources.keys(numbers)
                for place, (number, raw) in enumerate(zip(plan.samples, raws, strict=True)):
                    sample = self._sample(sources, plan, number, raw, keys[place])
                    yield sample | {"__place__": (plan.step, plan.number, place)}

    def _sample(self, sources: Sources, plan: Plan, number: int, raw: Sample, name: str) -> Sample:
        try:
            return self._decode(sources, plan, number, raw, name)
        except BadSample as error:
            return self._stand_in(sources, plan, number, name, str(error))

    def _decode(self, sources: Sources, plan: Plan, number: int, raw: Sample, name: str) -> Sample:
        # In evaluation (step 0) there is no choice: metrics must not depend on one.
        chosen = plan.step and self.fields.text and self.fields.text.choose == "random"
        stream = key(self.seed, "caption", plan.step, number) if chosen else None
        source, row = sources.place(number)
        shard = sources.shard_name(number)
        where = f"{shard}: sample {name!r}"
        sample = self.fields.decode(raw, where, stream)
        sample |= self.fields.codes(source, self.indexes[source], row, raw, where)
        return sample | {"__key__": name, "__url__": shard, "__sample__": number}

    def _stand_in(self, sources: Sources, plan: Plan, number: int, name: str, why: str) -> Sample:
        source, row = sources.place(number)
        for attempt in range(ATTEMPTS):
            other = substitute(self.seed, number, attempt, len(self.indexes[source]))
            chosen = int(number_of(np.array([source]), np.array([other]))[0])
            at = np.array([chosen])
            try:
                raw = sources.read(at, self.members)[0]
                sample = self._decode(sources, plan, chosen, raw, sources.keys(at)[0])
            except BadSample:
                continue
            shard = sources.shard_name(number)
            bad = Bad(plan.step, plan.number, source, shard, name, row, other, why)
            return sample | {"__bad__": bad}
        raise GigabatchError(
            f"{why} And so it is with {ATTEMPTS} others that were tried in its place: the set is "
            f"not what was indexed. Check it with `gigabatch data check "
            f"{self.indexes[source].source}`."
        )


def _ahead(plans: Iterator[Plan], sources: Sources) -> Iterator[Plan]:
    """The plans, once the shards of those after them are on their way."""
    held: deque[Plan] = deque()
    for plan in plans:
        sources.prefetch(np.array(plan.samples, np.int64))
        held.append(plan)
        if len(held) > AHEAD:
            yield held.popleft()
    yield from held


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
class Batches:
    """The last stage: groups samples into the MicroBatches of `plans`, and collates each."""

    plans: Iterable[Plan]
    collate: Collate

    def __call__(self, samples: Iterator[Sample]) -> Iterator[MicroBatch]:
        samples = iter(samples)
        for plan in _share(self.plans):
            rows = list(islice(samples, len(plan.samples)))
            # Compared with the plan, so that a stage cannot even lose a whole micro-batch unseen.
            wanted = [(plan.step, plan.number, place) for place in range(len(plan.samples))]
            if [row.get("__place__") for row in rows] != wanted:
                raise GigabatchError(
                    "a data stage dropped, repeated or moved samples (micro-batch "
                    f"{plan.number} of step {plan.step}). Stages must return each sample once, in "
                    "order; filter with `gigabatch data filter` instead."
                )
            keys = tuple(row["__key__"] for row in rows)
            bad = tuple(row["__bad__"] for row in rows if "__bad__" in row)
            tensors = self.collate(rows)
            more = tuple(self.collate.fields.more)
            yield MicroBatch(plan.step, plan.number, plan.real, keys, tensors, bad, more)


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
    indexes: Sequence[Index],
    plans: Iterable[Plan],
    *,
    fields: Fields,
    tokenizer: Path | None,
    seed: int,
    workers: int,
    prefetch: int,
    stages: Sequence[Stage] = (),
    pin_memory: bool = False,
    cache: ShardCache | None = None,
) -> wds.DataPipeline:
    """The micro-batches of `plans`, in order, read by `workers` processes (0: in this one).

    `indexes`: the sources, in the order of their numbers. `plans` must allow more than one pass.
    `tokenizer`: its file, where there is text. `prefetch`: micro-batches each loader worker keeps
    ready. `stages`: ordinary webdataset stages, from decoded sample to decoded sample.
    Raises GigabatchError where samples lack a modality or field; iterating raises it for what
    cannot be read.
    """
    pipeline = wds.DataPipeline(
        MicroBatchSource(indexes, plans, fields, seed, cache),
        *stages,
        Batches(plans, Collate(fields, tokenizer.read_text() if tokenizer else None)),
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


def load_stage(path: str) -> Stage:
    """The webdataset stage at `package.mod:name`, a function of an iterator of samples."""
    module, _, name = path.partition(":")
    try:
        stage = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise GigabatchError(f"data.stages: {path!r} cannot be imported: {error}.") from error
    if not callable(stage):
        raise GigabatchError(f"data.stages: {path!r} is not a function of an iterator of samples.")
    return stage


def by_step(stream: Iterable[MicroBatch], per_step: int) -> Iterator[list[MicroBatch]]:
    """Group a rank's micro-batches by step."""
    iterator = iter(stream)
    for first in iterator:
        rest = (next(iterator) for _ in range(per_step - 1))
        yield list(chain([first], rest))
