"""Writer of small synthetic data sets as WebDataset shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES_PER_SHARD = 1024
Array = np.ndarray[Any, Any]


def write_set(folder: Path, members: Mapping[str, Sequence[Any] | Array]) -> None:
    """Write samples as the shards of a new folder; sample i has the key `%06d` of i.

    Args:
        folder: Folder to create.
        members: File extension -> one value per sample: dicts for `json`, arrays for `npy` or
            `NAME.npy`, strings for `txt`, uint8 [H, W, 3] or encoded bytes for `png`.
    """
    import webdataset as wds  # here, because it imports torch, which takes seconds

    folder.mkdir(parents=True)
    count = len(next(iter(members.values())))
    for shard, first in enumerate(range(0, count, SAMPLES_PER_SHARD)):
        with wds.TarWriter(str(folder / f"{folder.name}-{shard:05d}.tar"), mtime=0) as writer:
            for i in range(first, min(first + SAMPLES_PER_SHARD, count)):
                sample = {name: _encodable(name, values[i]) for name, values in members.items()}
                writer.write({"__key__": f"{i:06d}", **sample})


def _encodable(name: str, value: Any) -> Any:
    """Convert numpy scalars for JSON, and vectors to float32 to halve their size."""
    if name.endswith("npy"):
        return np.asarray(value, np.float32)
    if name == "json":
        return {key: item.item() if isinstance(item, np.generic) else item
                for key, item in value.items()}  # fmt: skip
    return value


def unit(vectors: Array) -> Array:
    """Scale vectors [..., D] to unit length."""
    lengths: Array = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / lengths
