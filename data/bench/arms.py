"""The stages that are measured, and at each the contenders: ours, and plain webdataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from gigabatch.data.bench import plain, work
from gigabatch.data.bench.setup import Setup
from gigabatch.data.bench.work import Held, Pieces, encoded_bytes, tensor_bytes
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.shards.index import Index

OURS, PLAIN = "gigabatch", "webdataset"
READING, DECODING, STAGES = "reading", "decoding", "your own stages"
TOKENISING, COLLATING = "tokenising", "collating"
TRANSFER, AUGMENTING = "transfer", "augmenting"
HEADERS, VERIFIED = "indexing by headers", "indexing, verified"
IN_LOADER = (READING, DECODING, STAGES, TOKENISING, COLLATING)
IN_TRAINER = (TRANSFER, AUGMENTING)


@dataclass(frozen=True)
class Arm:
    """One contender at one stage. `open`: its pieces, without end. Time is taken after the first
    `group` of them, and by the `group`: loader workers take turns."""

    stage: str
    name: str
    open: Callable[[], Pieces]
    group: int = 1


def together(workers: int) -> str:
    return f"together, {counted(workers)}"


def whole(workers: int) -> str:
    return f"with transfer and augmenting, {counted(workers)}"


def counted(workers: int) -> str:
    return f"{workers} worker{'' if workers == 1 else 's'}"


def arms(setup: Setup) -> Iterator[list[Arm]]:
    """Stage by stage, those to be compared."""
    held, unable = Held(setup), plain.unable(setup)
    yield list(_reading(setup))
    yield list(_decoding(held, unable))
    if setup.stages:
        yield [Arm(STAGES, OURS, partial(work.stages, held))]
    if setup.fields.text is not None:
        yield [Arm(TOKENISING, OURS, partial(work.tokenise, held))]
    yield [Arm(COLLATING, OURS, partial(work.collate, held))]
    if setup.device.type != "cpu":
        yield [Arm(TRANSFER, OURS, partial(work.transfer, held))]
    if setup.augments:
        yield [Arm(AUGMENTING, OURS, partial(work.augmented, held))]
    for index, shard in _local_shard(setup):
        yield [Arm(HEADERS, OURS, partial(work.index, index, shard, False))]
        yield [Arm(VERIFIED, OURS, partial(work.index, index, shard, True))]
    for workers in setup.workers:
        group = max(1, workers)
        both = [Arm(together(workers), OURS, partial(work.stream, setup, workers), group)]
        if not unable:
            both.append(Arm(together(workers), PLAIN, partial(_plain, setup, workers), group))
        yield both
        if setup.device.type != "cpu" or setup.augments:
            yield [Arm(whole(workers), OURS, partial(work.stream, setup, workers, True), group)]


def _reading(setup: Setup) -> Iterator[Arm]:
    yield Arm(READING, OURS, partial(work.read, setup, setup.indexes))
    if not setup.remote:
        yield Arm(READING, PLAIN, partial(_plain_read, setup))
    if any(index.settings.checksums for index in setup.indexes):
        bare = [
            replace(index, settings=index.settings.model_copy(update={"checksums": False}))
            for index in setup.indexes
        ]
        yield Arm(READING, f"{OURS}, unverified", partial(work.read, setup, bare))


def _decoding(held: Held, unable: str) -> Iterator[Arm]:
    yield Arm(DECODING, OURS, partial(work.decode, held))
    if held.setup.fields.image is not None and not unable:
        yield Arm(DECODING, "PIL at full scale", partial(plain.decode, held))


def _local_shard(setup: Setup) -> list[tuple[Index, int]]:
    """The local shard of the most samples, if there is one."""
    local = [
        (shard.samples, index, number)
        for index in setup.indexes
        for number, shard in enumerate(index.shards)
        if shard.samples and not is_remote(shard.name)
    ]
    return [max(local, key=lambda each: each[0])[1:]] if local else []


def _plain_read(setup: Setup) -> Pieces:
    for sample in plain.raw_samples(setup):
        yield 1, encoded_bytes(sample)


def _plain(setup: Setup, workers: int) -> Pieces:
    for batch in plain.batches(setup, workers):
        yield len(batch["keys"]), tensor_bytes(batch)
