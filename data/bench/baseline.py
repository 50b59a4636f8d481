"""Baseline: a pipeline of webdataset and PIL, as their users typically build it.

It uses the same shards, sizes, tokenizer, columns, stages, workers and batches as gigabatch. It
differs in order (random shards, a shuffle buffer), verifies no checksums, and decodes JPEGs at full
scale.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from gigabatch.data.bench.setup import Setup
from gigabatch.data.bench.workloads import HeldBatches, Pieces
from gigabatch.data.decode.fields import Sample
from gigabatch.data.decode.ids import code_of
from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.processes import ignore_ctrl_c
from gigabatch.data.shards.sources import SOURCE_COLUMN
from gigabatch.data.text.captions import read_captions

SHUFFLE = 1000
"""Number of samples in the shuffle buffer."""


def unsupported(setup: Setup) -> str:
    """Return why the baseline cannot read this data; empty if it can."""
    fields = setup.fields
    if setup.remote:
        return "webdataset reads remote shards by shell commands only"
    if fields.more or fields.arrays or fields.allow_missing:
        return "this pipeline supports only images and captions that every sample has"
    if fields.text is not None and fields.text.choose == "all":
        return "this pipeline supports only one caption per sample"
    return ""


def describe(setup: Setup) -> str:
    """Describe the pipeline in one line."""
    image = setup.fields.image
    steps = [f"WebDataset(resampled=True).shuffle({SHUFFLE}, initial={SHUFFLE})"]
    if image is not None:
        steps.append(f"decode({_mode(image)!r}), bicubic resize and center crop to {image.size}")
    steps += [f"{len(setup.stages)} user stages"] if setup.stages else []
    steps.append(f"batched({setup.batch_size}) with torch.stack and encode_batch")
    return f"{', '.join(steps)}, WebLoader with the same workers and prefetch; no checksums"


def _mode(image: ImageSettings) -> str:
    return "pill" if image.channels == 1 else "pilrgb"


def raw_samples(setup: Setup) -> Iterator[Sample]:
    """Yield undecoded samples of all shards in order, endlessly."""
    while True:
        yield from wds.WebDataset(setup.shards, shardshuffle=False)


def batches(setup: Setup, workers: int) -> Iterator[dict[str, Any]]:
    """Yield micro-batches endlessly.

    Yields:
        `image` uint8 [B, C, S, S], `text` int64 [B, L] with `text_mask` bool [B, L], columns
        int64 [B], and `keys`, a list of B sample keys.
    """
    image = setup.fields.image
    source = wds.WebDataset(setup.shards, resampled=True, shardshuffle=False, seed=setup.seed)
    pipeline = source.shuffle(SHUFFLE, initial=SHUFFLE)
    if image is not None:
        pipeline = pipeline.decode(_mode(image), only=list(image.members))
    pipeline = pipeline.map(partial(_preprocess, setup, _sources(setup)))
    for stage in setup.stages:
        pipeline = pipeline.compose(stage)
    tokenizer = Tokenizer.from_file(str(setup.tokenizer)) if setup.tokenizer else None
    collate = partial(_collate, tokenizer, setup.fields.columns)
    pipeline = pipeline.batched(setup.batch_size, collation_fn=collate, partial=False)
    yield from wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=setup.prefetch if workers else None,
        pin_memory=setup.device.type == "cuda",
        worker_init_fn=_init_worker,
    )


def decode(held: HeldBatches) -> Pieces:
    """Decode images with PIL at full scale."""
    image = held.setup.fields.image
    assert image is not None
    for raw in cycle(held.raws):
        data = next(raw[member] for member in image.members if member in raw)
        assert isinstance(data, bytes)
        with Image.open(io.BytesIO(data)) as file:
            fit(file.convert("L" if image.channels == 1 else "RGB"), image)
        yield 1, len(data)


def fit(image: Image.Image, settings: ImageSettings) -> Tensor:
    """Resize the shorter side and crop the center, as torchvision; return uint8 [C, S, S]."""
    size = settings.size
    width, height = (int(size * side / min(image.size)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if (width, height) != (size, size):
        image = image.crop((left, top, left + size, top + size))
    pixels = np.array(image).reshape(size, size, settings.channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _preprocess(setup: Setup, sources: dict[str, int], sample: Sample) -> Sample:
    fields = setup.fields
    result: Sample = {"__key__": sample["__key__"]}
    if fields.image is not None:
        member = next(member for member in fields.image.members if member in sample)
        result["image"] = fit(sample[member], fields.image)
    if fields.text is not None:
        data = sample[fields.text.member]
        result["text"] = read_captions(data, fields.text, sample["__key__"])[0]
    tree = json.loads(sample["json"]) if set(fields.columns) - {SOURCE_COLUMN} else {}
    for name in fields.columns:
        result[name] = sources[sample["__url__"]] if name == SOURCE_COLUMN else code_of(tree[name])
    return result


def _sources(setup: Setup) -> dict[str, int]:
    return {s.name: number for number, index in enumerate(setup.indexes) for s in index.shards}


def _collate(
    tokenizer: Tokenizer | None, columns: Sequence[str], rows: Sequence[Sample]
) -> dict[str, Any]:
    batch: dict[str, Any] = {"keys": [row["__key__"] for row in rows]}
    if "image" in rows[0]:
        batch["image"] = torch.stack([row["image"] for row in rows])
    if tokenizer is not None and "text" in rows[0]:
        encoded = tokenizer.encode_batch([row["text"] for row in rows])
        batch["text"] = torch.tensor([e.ids for e in encoded])
        batch["text_mask"] = torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)
    for name in columns:
        batch[name] = torch.tensor([row[name] for row in rows])
    return batch


def _init_worker(worker: int) -> None:
    ignore_ctrl_c()
