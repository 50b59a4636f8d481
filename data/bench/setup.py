"""What is measured: a run's data, as its config has it."""

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
from gigabatch.data.remote.places import is_remote
from gigabatch.data.shards.index import Index
from gigabatch.data.stream import Stage

LOOKED_AT = 8  # micro-batches, from which the usual size is told


@dataclass(frozen=True)
class Setup:
    """`indexes`, `plans`, `fields`, `tokenizer`, `seed`, `prefetch`, `stages`, `cache`: see
    `open_stream`; few plans are read again and again. `augmentation`: None for none. `workers`:
    the numbers of loader processes to try; the bottleneck is that of the last.

    Raises GigabatchError where there is nothing to measure.
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
                f"workers are {list(self.workers)}: name numbers of loader processes, such as 0,2."
            )
        if self.fields.texts_only.modalities and self.tokenizer is None:
            raise GigabatchError("there is text to be read, but no tokeniser: give its file.")
        if not self.fields.modalities:
            raise GigabatchError("nothing of the samples is to be read: name an image or a text.")
        if not self.batch_size:
            raise GigabatchError("there is no micro-batch to be read: plan at least one step.")
        self.fields.members(self.indexes)  # raises for what the samples lack

    @cached_property
    def batch_size(self) -> int:
        """Samples in a micro-batch."""
        sizes = [len(plan.samples) for plan in islice(iter(self.plans), LOOKED_AT)]
        return max(sizes, default=0)

    @cached_property
    def shards(self) -> list[str]:
        return [shard.name for index in self.indexes for shard in index.shards if shard.samples]

    @property
    def remote(self) -> bool:
        return any(map(is_remote, self.shards))

    @property
    def augments(self) -> bool:
        return self.augmentation is not None and self.fields.image is not None

    def describe(self) -> dict[str, Any]:
        """What both contenders are given."""
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
