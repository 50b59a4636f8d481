"""The other contender: webdataset and PIL, put together as its users do.

The same shards, sizes, tokeniser, columns, stages, workers and batches as ours; but its own order
(shards drawn at random, a shuffle buffer), no checksums, and JPEGs decoded at full scale.
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
from gigabatch.data.bench.work import Held, Pieces
from gigabatch.data.decode.fields import Sample
from gigabatch.data.decode.members import IMAGE_MEMBERS, ImageSettings, code_of
from gigabatch.data.processes import ignore_ctrl_c
from gigabatch.data.shards.sources import SOURCE_COLUMN
from gigabatch.data.text.captions import read_captions

SHUFFLE = 1000


def unable(setup: Setup) -> str:
    """Why plain webdataset cannot do the same; empty where it can."""
    fields = setup.fields
    if setup.remote:
        return "its remote shards need a shell command"
    if fields.more or fields.arrays or fields.allow_missing:
        return "it is put together for images and captions that every sample has"
    if fields.text is not None and fields.text.choose == "all":
        return "it is put together for one caption a sample"
    return ""


def describe(setup: Setup) -> str:
    """The pipeline, in a line."""
    image = setup.fields.image
    steps = [f"WebDataset(resampled=True).shuffle({SHUFFLE}, initial={SHUFFLE})"]
    if image is not None:
        steps.append(f"decode({_mode(image)!r}), bicubic resize and centre crop to {image.size}")
    steps += [f"{len(setup.stages)} stages of your own"] if setup.stages else []
    steps.append(f"batched({setup.batch_size}) with torch.stack and encode_batch")
    return f"{', '.join(steps)}, WebLoader of the same workers and prefetch; no checksums"


def _mode(image: ImageSettings) -> str:
    return "pill" if image.channels == 1 else "pilrgb"


def raw_samples(setup: Setup) -> Iterator[Sample]:
    """Undecoded samples of all shards in turn, without end."""
    while True:
        yield from wds.WebDataset(setup.shards, shardshuffle=False)


def batches(setup: Setup, workers: int) -> Iterator[dict[str, Any]]:
    """Micro-batches without end: `image` uint8 [B, C, S, S], `text` int64 [B, L] with `text_mask`,
    the columns int64 [B], and `keys`."""
    image = setup.fields.image
    source = wds.WebDataset(setup.shards, resampled=True, shardshuffle=False, seed=setup.seed)
    pipeline = source.shuffle(SHUFFLE, initial=SHUFFLE)
    if image is not None:
        pipeline = pipeline.decode(_mode(image), only=list(IMAGE_MEMBERS))
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
        worker_init_fn=_start,
    )


def decode(held: Held) -> Pieces:
    """Images alone, at full scale."""
    image = held.setup.fields.image
    assert image is not None
    for raw in cycle(held.raws):
        data = next(raw[member] for member in IMAGE_MEMBERS if member in raw)
        assert isinstance(data, bytes)
        with Image.open(io.BytesIO(data)) as file:
            fit(file.convert("L" if image.channels == 1 else "RGB"), image)
        yield 1, len(data)


def fit(image: Image.Image, settings: ImageSettings) -> Tensor:
    """The short side resized, the centre cut out."""
    size = settings.size
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    if (width, height) != (size, size):
        image = image.crop((left, top, left + size, top + size))
    pixels = np.array(image).reshape(size, size, settings.channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _preprocess(setup: Setup, sources: dict[str, int], sample: Sample) -> Sample:
    fields = setup.fields
    out: Sample = {"__key__": sample["__key__"]}
    if fields.image is not None:
        member = next(member for member in IMAGE_MEMBERS if member in sample)
        out["image"] = fit(sample[member], fields.image)
    if fields.text is not None:
        out["text"] = read_captions(sample[fields.text.member], fields.text, sample["__key__"])[0]
    tree = json.loads(sample["json"]) if set(fields.columns) - {SOURCE_COLUMN} else {}
    for name in fields.columns:
        out[name] = sources[sample["__url__"]] if name == SOURCE_COLUMN else code_of(tree[name])
    return out


def _sources(setup: Setup) -> dict[str, int]:
    return {s.name: number for number, index in enumerate(setup.indexes) for s in index.shards}


def _collate(
    tokenizer: Tokenizer | None, columns: Sequence[str], rows: Sequence[Sample]
) -> dict[str, Any]:
    out: dict[str, Any] = {"keys": [row["__key__"] for row in rows]}
    if "image" in rows[0]:
        out["image"] = torch.stack([row["image"] for row in rows])
    if tokenizer is not None and "text" in rows[0]:
        encoded = tokenizer.encode_batch([row["text"] for row in rows])
        out["text"] = torch.tensor([e.ids for e in encoded])
        out["text_mask"] = torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)
    for name in columns:
        out[name] = torch.tensor([row[name] for row in rows])
    return out


def _start(worker: int) -> None:
    ignore_ctrl_c()
