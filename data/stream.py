"""The stream of micro-batches, as a `webdataset.DataPipeline`.

The source stage yields the decoded samples of this rank's micro-batches in order. The user's
webdataset stages follow; each returns one sample per sample. The last stage tokenizes and collates.
The only state is the step at which the stream starts.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from gigabatch.data.imports import import_object
from gigabatch.data.loader_errors import errors_as_values, prepare_worker, raise_errors
from gigabatch.data.order.assignment import MicroBatchPlan
from gigabatch.data.order.mixture import to_sample_number
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.rng import key
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.quarantine import ATTEMPTS, Substitution, substitute_row
from gigabatch.data.shards.sources import Sources

Stage = Callable[[Iterator[Sample]], Iterator[Sample]]
PREFETCH_MICRO_BATCHES = 16
"""Number of micro-batches whose remote shards are fetched in advance."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples that pass through the towers together: the unit of work and of randomness.

    Attributes:
        step: The training step, from 1; 0 in an evaluation.
        number: The micro-batch's number in its step. The run's seed, the step and this number
            form the RNG key of all its random numbers.
        real: False for padding, which passes through the towers so that collectives match, and
            does not affect the results.
        keys: The samples' keys.
        tensors: B rows each, by name:
            `image`: uint8 [B, C, H, W].
            `text`: int64 [B, L], with `text_mask` bool [B, L]; B K rows with K captions per sample.
            A modality in `more`: a text like the above; a vector, float32 [B, size]; vectors,
            float32 [B, L, size] with `NAME_mask` bool [B, L]; audio, float32 [B, T] with
            `NAME_length` int64 [B].
            An array member: [B, ...].
            `NAME_present`: bool, true where the row has that modality; exists only if modalities
            may be missing.
            `sample`: int64 [B], sample numbers.
            A requested column: int64 [B] codes, float32 [B] numbers or float32 [B, size] vectors.
        substitutions: The unusable samples of this micro-batch and their substitutes.
        more: Names of the modalities other than image and text.
    """

    step: int
    number: int
    real: bool
    keys: tuple[str, ...]
    tensors: dict[str, Tensor] = field(repr=False)
    substitutions: tuple[Substitution, ...] = ()
    more: tuple[str, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy whose tensors are on `device`; the transfers may still be in progress."""
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors.items()}
        return replace(self, tensors=moved)

    def pin_memory(self) -> MicroBatch:
        """Return a copy in pinned memory; the data loader calls this."""
        return replace(self, tensors={name: t.pin_memory() for name, t in self.tensors.items()})


class MicroBatchSource(IterableDataset[Sample]):
    """The source stage: decoded samples of this rank's micro-batches.

    Loader workers take micro-batches round-robin. Each micro-batch reseeds torch, numpy and
    `random`, so that a user's random stage gives the same result on any rank and loader worker.
    """

    def __init__(
        self,
        indexes: Sequence[Index],
        plans: Iterable[MicroBatchPlan],
        fields: Fields,
        seed: int,
        cache: ShardCache | None,
    ) -> None:
        self.indexes, self.plans, self.fields = tuple(indexes), plans, fields
        self.seed, self.cache = seed, cache
        self.members = fields.members(self.indexes)

    def __iter__(self) -> Iterator[Sample]:
        with Sources(self.indexes, self.cache) as sources:
            plans = _worker_share(self.plans)
            for plan in _prefetch_shards(plans, sources) if sources.remote else plans:
                _seed_all(key(self.seed, "stage", plan.step, plan.number))
                numbers = np.array(plan.samples, np.int64)
                raws = sources.read(numbers, self.members)
                keys = sources.keys(numbers)
                for row, (number, raw) in enumerate(zip(plan.samples, raws, strict=True)):
                    sample = self._sample(sources, plan, number, raw, keys[row])
                    yield sample | {"__position__": (plan.step, plan.number, row)}

    def _sample(
        self, sources: Sources, plan: MicroBatchPlan, number: int, raw: Sample, name: str
    ) -> Sample:
        """Decode one sample, or its substitute."""
        try:
            return self._decode(sources, plan, number, raw, name)
        except BadSample as error:
            return self._substitute(sources, plan, number, name, str(error))

    def _decode(
        self, sources: Sources, plan: MicroBatchPlan, number: int, raw: Sample, name: str
    ) -> Sample:
        # An evaluation (step 0) takes the first caption: metrics must not depend on a draw.
        draws_caption = plan.step and self.fields.text and self.fields.text.choose == "random"
        rng_key = key(self.seed, "caption", plan.step, number) if draws_caption else None
        source, row = sources.source_and_row(number)
        shard = sources.shard_name(number)
        where = f"{shard}: sample {name!r}"
        sample = self.fields.decode(raw, where, rng_key)
        sample |= self.fields.column_values(source, self.indexes[source], row, raw, where)
        return sample | {"__key__": name, "__url__": shard, "__sample__": number}

    def _substitute(
        self, sources: Sources, plan: MicroBatchPlan, number: int, name: str, why: str
    ) -> Sample:
        """Decode a substitute for sample `number`, which is bad for the reason `why`."""
        source, row = sources.source_and_row(number)
        for attempt in range(ATTEMPTS):
            other = substitute_row(self.seed, number, attempt, len(self.indexes[source]))
            numbers = to_sample_number(np.array([source]), np.array([other]))
            try:
                raw = sources.read(numbers, self.members)[0]
                key_of_other = sources.keys(numbers)[0]
                sample = self._decode(sources, plan, int(numbers[0]), raw, key_of_other)
            except BadSample:
                continue
            shard = sources.shard_name(number)
            record = Substitution(plan.step, plan.number, source, shard, name, row, other, why)
            return sample | {"__substitution__": record}
        raise GigabatchError(
            f"{why} {ATTEMPTS} substitutes are bad too, so the set is not what was indexed. Check "
            f"it with `gigabatch data check {self.indexes[source].source}`."
        )


def _prefetch_shards(plans: Iterator[MicroBatchPlan], sources: Sources) -> Iterator[MicroBatchPlan]:
    """Yield the plans, and start fetching the remote shards of the plans that follow."""
    ahead: deque[MicroBatchPlan] = deque()
    for plan in plans:
        sources.prefetch(np.array(plan.samples, np.int64))
        ahead.append(plan)
        if len(ahead) > PREFETCH_MICRO_BATCHES:
            yield ahead.popleft()
    yield from ahead


def _worker_share(plans: Iterable[MicroBatchPlan]) -> Iterator[MicroBatchPlan]:
    """Yield every n-th plan in each of n loader workers."""
    # The loader takes micro-batches from its workers round-robin, so this keeps their order.
    worker = get_worker_info()
    offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
    return islice(plans, offset, None, stride)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed % (1 << 63))
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


@dataclass(frozen=True)
class CollateStage:
    """The last stage: group samples into the micro-batches of `plans` and collate them."""

    plans: Iterable[MicroBatchPlan]
    collate: Collate

    def __call__(self, samples: Iterator[Sample]) -> Iterator[MicroBatch]:
        samples = iter(samples)
        for plan in _worker_share(self.plans):
            rows = list(islice(samples, len(plan.samples)))
            # Compare with the plan: otherwise a stage could drop a full micro-batch unnoticed.
            expected = [(plan.step, plan.number, row) for row in range(len(plan.samples))]
            if [row.get("__position__") for row in rows] != expected:
                raise GigabatchError(
                    "data.stages: a stage dropped, repeated or moved samples (micro-batch "
                    f"{plan.number} of step {plan.step}). Stages must return every sample once, in "
                    "order; filter samples with `gigabatch data filter` instead."
                )
            keys = tuple(row["__key__"] for row in rows)
            records = tuple(row["__substitution__"] for row in rows if "__substitution__" in row)
            tensors = self.collate(rows)
            more = tuple(self.collate.fields.more)
            yield MicroBatch(plan.step, plan.number, plan.real, keys, tensors, records, more)


def open_stream(
    indexes: Sequence[Index],
    plans: Iterable[MicroBatchPlan],
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
    """Return the micro-batches of `plans`, in order, as an iterable of `MicroBatch`.

    Args:
        indexes: The sources, in the order of their source numbers.
        plans: The micro-batches to read; must allow more than one pass.
        fields: Fields to decode from every sample.
        tokenizer: Path of a `tokenizer.json`; required if `fields` has text.
        seed: The run's seed.
        workers: Number of loader processes; 0 reads in this process.
        prefetch: Number of micro-batches that each loader worker keeps ready.
        stages: The user's webdataset stages; each maps decoded samples to decoded samples.
        pin_memory: Return tensors in pinned memory.
        cache: Cache of remote shards; None uses this node's cache.

    Raises:
        GigabatchError: if samples lack a modality or field. Iteration also raises it if data cannot
            be read.
    """
    pipeline = wds.DataPipeline(
        MicroBatchSource(indexes, plans, fields, seed, cache),
        *stages,
        CollateStage(plans, Collate(fields, tokenizer.read_text() if tokenizer else None)),
        errors_as_values,
    )
    loader = wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
    )
    return loader.compose(raise_errors)


def load_stage(path: str) -> Stage:
    """Import the webdataset stage at `package.mod:name`, a function of an iterator of samples.

    Raises:
        GigabatchError: if it cannot be imported or called.
    """
    stage: Stage = import_object(path, "data.stages")
    if not callable(stage):
        raise GigabatchError(
            f"data.stages: {path!r} is not callable. Name a function of an iterator of samples."
        )
    return stage


def group_by_step(stream: Iterable[MicroBatch], per_step: int) -> Iterator[list[MicroBatch]]:
    """Yield a rank's micro-batches in lists of `per_step`, one list per step."""
    iterator = iter(stream)
    for first in iterator:
        rest = (next(iterator) for _ in range(per_step - 1))
        yield list(chain([first], rest))
