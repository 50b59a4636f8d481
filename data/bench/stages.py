"""Stages of the benchmark and their implementations: gigabatch and the webdataset baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from gigabatch.data.bench import baseline, workloads
from gigabatch.data.bench.setup import Setup
from gigabatch.data.bench.workloads import HeldBatches, Pieces, encoded_bytes, tensor_bytes
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.shards.index import Index

GIGABATCH, BASELINE = "gigabatch", "webdataset"
READING, DECODING, USER_STAGES = "reading", "decoding", "user stages"
TOKENIZING, COLLATING = "tokenizing", "collating"
TRANSFER, AUGMENTING = "transfer", "augmenting"
HEADERS, VERIFIED = "indexing by headers", "indexing, verified"
IN_LOADER = (READING, DECODING, USER_STAGES, TOKENIZING, COLLATING)
IN_TRAINER = (TRANSFER, AUGMENTING)


@dataclass(frozen=True)
class Variant:
    """One implementation of one stage.

    Attributes:
        stage: Name of the stage.
        name: Name of the implementation.
        open: Starts an endless generator of pieces of work.
        group: Number of pieces timed as one unit; also the number of warm-up pieces. Equals the
            number of loader workers, which deliver pieces round-robin.
    """

    stage: str
    name: str
    open: Callable[[], Pieces]
    group: int = 1


def loading_stage(workers: int) -> str:
    """Return the name of the stage that runs all loader stages at once."""
    return f"all loader stages, {_worker_count(workers)}"


def full_stage(workers: int) -> str:
    """Return the name of the stage that also transfers and augments."""
    return f"with transfer and augmenting, {_worker_count(workers)}"


def _worker_count(workers: int) -> str:
    return f"{workers} worker{'' if workers == 1 else 's'}"


def variants_by_stage(setup: Setup) -> Iterator[list[Variant]]:
    """Yield the implementations to compare, one list per stage."""
    held, reason = HeldBatches(setup), baseline.unsupported(setup)
    yield list(_reading(setup))
    yield list(_decoding(held, reason))
    if setup.stages:
        yield [Variant(USER_STAGES, GIGABATCH, partial(workloads.user_stages, held))]
    if setup.fields.text is not None:
        yield [Variant(TOKENIZING, GIGABATCH, partial(workloads.tokenize, held))]
    yield [Variant(COLLATING, GIGABATCH, partial(workloads.collate, held))]
    if setup.device.type != "cpu":
        yield [Variant(TRANSFER, GIGABATCH, partial(workloads.transfer, held))]
    if setup.augments:
        yield [Variant(AUGMENTING, GIGABATCH, partial(workloads.augment_batches, held))]
    for index, shard in _largest_local_shard(setup):
        yield [Variant(HEADERS, GIGABATCH, partial(workloads.index, index, shard, False))]
        yield [Variant(VERIFIED, GIGABATCH, partial(workloads.index, index, shard, True))]
    for workers in setup.workers:
        group, stage = max(1, workers), loading_stage(workers)
        variants = [Variant(stage, GIGABATCH, partial(workloads.stream, setup, workers), group)]
        if not reason:
            load = partial(_baseline_stream, setup, workers)
            variants.append(Variant(stage, BASELINE, load, group))
        yield variants
        if setup.device.type != "cpu" or setup.augments:
            stream = partial(workloads.stream, setup, workers, True)
            yield [Variant(full_stage(workers), GIGABATCH, stream, group)]


def _reading(setup: Setup) -> Iterator[Variant]:
    yield Variant(READING, GIGABATCH, partial(workloads.read, setup, setup.indexes))
    if not setup.remote:
        yield Variant(READING, BASELINE, partial(_baseline_read, setup))
    if any(index.settings.checksums for index in setup.indexes):
        unverified = [
            replace(index, settings=index.settings.model_copy(update={"checksums": False}))
            for index in setup.indexes
        ]
        name = f"{GIGABATCH}, unverified"
        yield Variant(READING, name, partial(workloads.read, setup, unverified))


def _decoding(held: HeldBatches, unsupported: str) -> Iterator[Variant]:
    yield Variant(DECODING, GIGABATCH, partial(workloads.decode, held))
    if held.setup.fields.image is not None and not unsupported:
        yield Variant(DECODING, "PIL at full scale", partial(baseline.decode, held))


def _largest_local_shard(setup: Setup) -> list[tuple[Index, int]]:
    """Return the local shard with the most samples, or an empty list if all shards are remote."""
    local = [
        (shard.samples, index, number)
        for index in setup.indexes
        for number, shard in enumerate(index.shards)
        if shard.samples and not is_remote(shard.name)
    ]
    return [max(local, key=lambda entry: entry[0])[1:]] if local else []


def _baseline_read(setup: Setup) -> Pieces:
    for sample in baseline.raw_samples(setup):
        yield 1, encoded_bytes(sample)


def _baseline_stream(setup: Setup, workers: int) -> Pieces:
    for batch in baseline.batches(setup, workers):
        yield len(batch["keys"]), tensor_bytes(batch)
