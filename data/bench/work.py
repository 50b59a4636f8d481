"""What each stage of our reader does, over and over, in countable pieces.

A piece is (samples, bytes): bytes of members read, of encoded images and texts, or of tensors made.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigabatch.data.augment import augment
from gigabatch.data.bench.setup import Setup
from gigabatch.data.decode.collate import Collate
from gigabatch.data.decode.fields import Sample
from gigabatch.data.rng import key
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.reader import DamagedMember
from gigabatch.data.shards.scan import IndexSettings, scan_shard
from gigabatch.data.shards.sources import Sources
from gigabatch.data.stream import MicroBatch, MicroBatchSource, open_stream
from gigabatch.data.text.tokenizer import encode, load_tokenizer

HELD_SAMPLES, HELD_BYTES = 2048, 256 << 20
Raw = dict[str, bytes | DamagedMember]
Pieces = Generator[tuple[int, int], None, None]


class Held:
    """The first micro-batches, as many as memory is allowed for: the input of single stages."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @cached_property
    def _read(self) -> list[tuple[list[Raw], list[Sample]]]:
        """Of each micro-batch its samples, as they lie in the shards, and decoded."""
        setup, out, samples, size = self.setup, [], 0, 0
        members = setup.fields.members(setup.indexes)
        source = MicroBatchSource(setup.indexes, setup.plans, setup.fields, setup.seed, setup.cache)
        decoded = iter(source)
        with Sources(setup.indexes, setup.cache) as sources:
            for plan in setup.plans:
                raws = sources.read(np.array(plan.samples, np.int64), members)
                rows = list(islice(decoded, len(plan.samples)))
                out.append((raws, rows))
                samples += len(rows)
                size += sum(map(encoded_bytes, raws)) + sum(map(tensor_bytes, rows))
                if samples >= HELD_SAMPLES or size >= HELD_BYTES:
                    break
        return out

    @cached_property
    def raws(self) -> list[Raw]:
        """The samples that can be decoded."""
        pairs = [pair for raws, rows in self._read for pair in zip(raws, rows, strict=True)]
        return [raw for raw, row in pairs if "__substitution__" not in row]

    @cached_property
    def decoded(self) -> list[list[Sample]]:
        return [rows for _, rows in self._read]

    @cached_property
    def rows(self) -> list[list[Sample]]:
        """Decoded, and through the user's stages."""
        return [list(staged(self.setup, rows)) for rows in self.decoded]

    @cached_property
    def batches(self) -> list[MicroBatch]:
        return list(islice(micro_batches(self.setup, 0), len(self._read)))


def read(setup: Setup, indexes: Sequence[Index]) -> Pieces:
    """Batch by batch, in the order of the run."""
    members = setup.fields.members(indexes)
    with Sources(indexes, setup.cache) as sources:
        while True:
            for plan in setup.plans:
                raws = sources.read(np.array(plan.samples, np.int64), members)
                yield len(raws), sum(map(encoded_bytes, raws))


def decode(held: Held) -> Pieces:
    for raw in cycle(held.raws):
        held.setup.fields.decode(raw, "a sample", 0)
        yield 1, encoded_bytes(raw)


def stages(held: Held) -> Pieces:
    """The user's own."""
    for rows in cycle(held.decoded):
        made = list(staged(held.setup, rows))
        yield len(made), sum(map(tensor_bytes, made))


def staged(setup: Setup, rows: Sequence[Sample]) -> Iterator[Sample]:
    samples = iter([dict(row) for row in rows])
    for stage in setup.stages:
        samples = iter(stage(samples))
    return samples


def tokenise(held: Held) -> Pieces:
    assert held.setup.tokenizer is not None
    tokenizer = load_tokenizer(held.setup.tokenizer)
    for rows in cycle(held.rows):
        captions: list[str] = []
        for row in rows:
            text = row.get("text", [])
            captions += [text] if isinstance(text, str) else text
        encode(tokenizer, captions)
        yield len(rows), sum(len(caption.encode()) for caption in captions)


def collate(held: Held) -> Pieces:
    """All but the text, which is tokenising."""
    collating = Collate(replace(held.setup.fields, text=None), None)
    for rows in cycle(held.rows):
        yield len(rows), tensor_bytes(collating(rows))


def transfer(held: Held) -> Pieces:
    for batch in cycle([batch.pin_memory() for batch in held.batches]):
        moved = batch.to(held.setup.device)
        settle(held.setup.device)
        yield len(moved.keys), tensor_bytes(moved.tensors)


def augmented(held: Held) -> Pieces:
    device = held.setup.device
    images = [batch.tensors["image"].to(device) for batch in held.batches]
    for number, batch in enumerate(cycle(images)):
        made = augment_one(held.setup, batch, number)
        settle(device)
        yield len(made), made.nbytes


def augment_one(setup: Setup, images: Tensor, number: int) -> Tensor:
    assert setup.augmentation is not None
    return augment(images, setup.augmentation, key(setup.seed, "bench", number))


def index(of: Index, shard: int, checksums: bool) -> Pieces:
    """Scan one shard."""
    name = of.shards[shard].name
    settings = IndexSettings(checksums=checksums, dotted=of.settings.dotted)
    file = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            scan_shard(file, name, settings)
            yield of.shards[shard].samples, of.shards[shard].bytes
    finally:
        os.close(file)


def stream(setup: Setup, workers: int, on_device: bool = False) -> Pieces:
    """Micro-batches as a run gets them; `on_device`: moved there and augmented."""
    while True:
        for batch in micro_batches(setup, workers):
            size = tensor_bytes(batch.tensors)
            if on_device:
                batch = batch.to(setup.device)
                if setup.augments:
                    augment_one(setup, batch.tensors["image"], batch.number)
                settle(setup.device)
            yield len(batch.keys), size


def micro_batches(setup: Setup, workers: int) -> Iterator[MicroBatch]:
    yield from open_stream(
        setup.indexes,
        setup.plans,
        fields=setup.fields,
        tokenizer=setup.tokenizer,
        seed=setup.seed,
        workers=workers,
        prefetch=setup.prefetch,
        stages=setup.stages,
        pin_memory=setup.device.type == "cuda",
        cache=setup.cache,
    )


def settle(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def encoded_bytes(raw: Mapping[str, Any]) -> int:
    return sum(len(data) for data in raw.values() if isinstance(data, bytes))


def tensor_bytes(tensors: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in tensors.values() if isinstance(value, Tensor))
