"""Small sets of made-up samples, written as ordinary shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

SHARD = 1024
Array = np.ndarray[Any, Any]


def write_set(folder: Path, members: Mapping[str, Sequence[Any] | Array]) -> None:
    """`members`: of each extension a value a sample, such as dicts for `json`, arrays for `npy` or
    `a.npy`, str for `txt`, uint8 [H, W, 3] for `png`. Sample i has the key %06d of i."""
    folder.mkdir(parents=True)
    count = len(next(iter(members.values())))
    for shard, first in enumerate(range(0, count, SHARD)):
        with wds.TarWriter(str(folder / f"{folder.name}-{shard:05d}.tar"), mtime=0) as writer:
            for i in range(first, min(first + SHARD, count)):
                sample = {name: _plain(name, values[i]) for name, values in members.items()}
                writer.write({"__key__": f"{i:06d}", **sample})


def _plain(name: str, value: Any) -> Any:
    """Numbers of numpy are none of json's; vectors take half the room in float32."""
    if name.endswith("npy"):
        return np.asarray(value, np.float32)
    if name == "json":
        return {key: each.item() if isinstance(each, np.generic) else each
                for key, each in value.items()}  # fmt: skip
    return value


def unit(vectors: Array) -> Array:
    """Rows [..., D] of length 1."""
    lengths: Array = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / lengths
