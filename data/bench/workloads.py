"""Repeat the work of each stage of the gigabatch reader endlessly, in counted pieces.

A piece is (samples, bytes). Bytes count members read, encoded images and texts, or tensors created.
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
"""Limits of `HeldBatches`, which stops at the first micro-batch that reaches one of them."""
Raw = dict[str, bytes | DamagedMember]
Pieces = Generator[tuple[int, int], None, None]


class HeldBatches:
    """The first micro-batches, held in memory as input of separate stages."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @cached_property
    def _batches(self) -> list[tuple[list[Raw], list[Sample]]]:
        """Samples of each micro-batch, encoded and decoded."""
        setup, batches, samples, size = self.setup, [], 0, 0
        members = setup.fields.members(setup.indexes)
        source = MicroBatchSource(setup.indexes, setup.plans, setup.fields, setup.seed, setup.cache)
        decoded = iter(source)
        with Sources(setup.indexes, setup.cache) as sources:
            for plan in setup.plans:
                raws = sources.read(np.array(plan.samples, np.int64), members)
                rows = list(islice(decoded, len(plan.samples)))
                batches.append((raws, rows))
                samples += len(rows)
                size += sum(map(encoded_bytes, raws)) + sum(map(tensor_bytes, rows))
                if samples >= HELD_SAMPLES or size >= HELD_BYTES:
                    break
        return batches

    @cached_property
    def raws(self) -> list[Raw]:
        """Encoded samples, without those that cannot be decoded."""
        pairs = [pair for raws, rows in self._batches for pair in zip(raws, rows, strict=True)]
        return [raw for raw, row in pairs if "__substitution__" not in row]

    @cached_property
    def decoded(self) -> list[list[Sample]]:
        """Decoded samples of each micro-batch."""
        return [rows for _, rows in self._batches]

    @cached_property
    def rows(self) -> list[list[Sample]]:
        """Decoded samples of each micro-batch, after the user's stages."""
        return [list(apply_stages(self.setup, rows)) for rows in self.decoded]

    @cached_property
    def batches(self) -> list[MicroBatch]:
        """Collated micro-batches."""
        return list(islice(micro_batches(self.setup, 0), len(self._batches)))


def read(setup: Setup, indexes: Sequence[Index]) -> Pieces:
    """Read micro-batches from shards, in the order of the run."""
    members = setup.fields.members(indexes)
    with Sources(indexes, setup.cache) as sources:
        while True:
            for plan in setup.plans:
                raws = sources.read(np.array(plan.samples, np.int64), members)
                yield len(raws), sum(map(encoded_bytes, raws))


def decode(held: HeldBatches) -> Pieces:
    """Decode samples."""
    for raw in cycle(held.raws):
        held.setup.fields.decode(raw, "a sample", 0)
        yield 1, encoded_bytes(raw)


def user_stages(held: HeldBatches) -> Pieces:
    """Run the user's stages."""
    for rows in cycle(held.decoded):
        results = list(apply_stages(held.setup, rows))
        yield len(results), sum(map(tensor_bytes, results))


def apply_stages(setup: Setup, rows: Sequence[Sample]) -> Iterator[Sample]:
    """Apply the user's stages to copies of samples."""
    samples = iter([dict(row) for row in rows])
    for stage in setup.stages:
        samples = iter(stage(samples))
    return samples


def tokenize(held: HeldBatches) -> Pieces:
    """Tokenize captions."""
    assert held.setup.tokenizer is not None
    tokenizer = load_tokenizer(held.setup.tokenizer)
    for rows in cycle(held.rows):
        captions: list[str] = []
        for row in rows:
            text = row.get("text", [])
            captions += [text] if isinstance(text, str) else text
        encode(tokenizer, captions)
        yield len(rows), sum(len(caption.encode()) for caption in captions)


def collate(held: HeldBatches) -> Pieces:
    """Collate everything except text, which `tokenize` measures."""
    collator = Collate(replace(held.setup.fields, text=None), None)
    for rows in cycle(held.rows):
        yield len(rows), tensor_bytes(collator(rows))


def transfer(held: HeldBatches) -> Pieces:
    """Copy pinned micro-batches to the device."""
    for batch in cycle([batch.pin_memory() for batch in held.batches]):
        moved = batch.to(held.setup.device)
        synchronize(held.setup.device)
        yield len(moved.keys), tensor_bytes(moved.tensors)


def augment_batches(held: HeldBatches) -> Pieces:
    """Augment images on the device."""
    device = held.setup.device
    images = [batch.tensors["image"].to(device) for batch in held.batches]
    for number, batch in enumerate(cycle(images)):
        augmented = augment_images(held.setup, batch, number)
        synchronize(device)
        yield len(augmented), augmented.nbytes


def augment_images(setup: Setup, images: Tensor, number: int) -> Tensor:
    """Augment uint8 [B, C, H, W]; the micro-batch's `number` selects the random values."""
    assert setup.augmentation is not None
    return augment(images, setup.augmentation, key(setup.seed, "bench", number))


def index(source: Index, shard: int, checksums: bool) -> Pieces:
    """Scan one shard of `source`, with checksums or by headers only."""
    name = source.shards[shard].name
    settings = IndexSettings(checksums=checksums, dotted=source.settings.dotted)
    file = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            scan_shard(file, name, settings)
            yield source.shards[shard].samples, source.shards[shard].bytes
    finally:
        os.close(file)


def stream(setup: Setup, workers: int, on_device: bool = False) -> Pieces:
    """Load micro-batches like a run; `on_device` also moves and augments them."""
    while True:
        for batch in micro_batches(setup, workers):
            size = tensor_bytes(batch.tensors)
            if on_device:
                batch = batch.to(setup.device)
                if setup.augments:
                    augment_images(setup, batch.tensors["image"], batch.number)
                synchronize(setup.device)
            yield len(batch.keys), size


def micro_batches(setup: Setup, workers: int) -> Iterator[MicroBatch]:
    """Load all planned micro-batches once, with `workers` loader processes."""
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


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def encoded_bytes(raw: Mapping[str, Any]) -> int:
    """Return the size of a sample's members in bytes."""
    return sum(len(data) for data in raw.values() if isinstance(data, bytes))


def tensor_bytes(tensors: Mapping[str, Any]) -> int:
    """Return the size of all tensors in bytes."""
    return sum(value.nbytes for value in tensors.values() if isinstance(value, Tensor))
