"""Define the input of the benchmark: the data of a run, as its config describes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gigabatch.data.augment import Augmentation
from gigabatch.data.decode.fields import Fields
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.assignment import MicroBatchPlan
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.shards.index import Index
from gigabatch.data.stream import Stage

SIZE_SAMPLE = 8
"""Number of micro-batches used to estimate the typical size; the largest one counts."""


@dataclass(frozen=True)
class Setup:
    """Data of a run and how to load it.

    Attributes:
        indexes: Sets to read; this and the attributes not listed here are those of `open_stream`.
        plans: Micro-batches to read, repeated endlessly.
        workers: Numbers of loader processes to try; the bottleneck is reported for the last.
        device: Device to which batches are moved.
        augmentation: Augmentation of images; None for none.

    Raises:
        GigabatchError: if there is nothing to measure.
    """

    indexes: Sequence[Index]
    plans: Iterable[MicroBatchPlan]
    fields: Fields
    tokenizer: Path | None
    seed: int
    workers: Sequence[int]
    prefetch: int
    device: torch.device
    augmentation: Augmentation | None = None
    stages: Sequence[Stage] = ()
    cache: ShardCache | None = None

    def __post_init__(self) -> None:
        if not self.workers or min(self.workers) < 0:
            raise GigabatchError(
                f"workers are {list(self.workers)}: specify numbers of loader processes, such as "
                "0,2."
            )
        if self.fields.texts_only.modalities and self.tokenizer is None:
            raise GigabatchError(
                "the fields contain text, but there is no tokenizer: specify its file."
            )
        if not self.fields.modalities:
            raise GigabatchError("there are no fields to read: specify an image or a text.")
        if not self.batch_size:
            raise GigabatchError("there are no micro-batches to read: plan at least one step.")
        self.fields.members(self.indexes)  # Raises GigabatchError if the sets lack a member.

    @cached_property
    def batch_size(self) -> int:
        """Number of samples in a micro-batch."""
        sizes = [len(plan.samples) for plan in islice(iter(self.plans), SIZE_SAMPLE)]
        return max(sizes, default=0)

    @cached_property
    def shards(self) -> list[str]:
        """Names of all shards that contain samples."""
        return [shard.name for index in self.indexes for shard in index.shards if shard.samples]

    @property
    def remote(self) -> bool:
        """Whether any shard is remote."""
        return any(map(is_remote, self.shards))

    @property
    def augments(self) -> bool:
        """Whether images are augmented."""
        return self.augmentation is not None and self.fields.image is not None

    def describe(self) -> dict[str, Any]:
        """Return the facts of the report that all implementations share, as JSON values."""
        image = self.fields.image
        return {
            "shards": len(self.shards),
            "samples": sum(map(len, self.indexes)),
            "shard_bytes": sum(s.bytes for index in self.indexes for s in index.shards),
            "members": list(self.fields.members(self.indexes)),
            "checksums": all(index.settings.checksums for index in self.indexes),
            "batch": self.batch_size,
            "image": image and f"{image.channels} x {image.size} x {image.size}, uint8",
            "columns": list(self.fields.columns),
            "stages": len(self.stages),
            "workers": list(self.workers),
            "prefetch": self.prefetch,
        }
