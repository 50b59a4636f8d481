"""What the experiments on real drawings share: reading a folder of them, and towers that fit.

The folder holds `train`, `val-artist` and `val-concept`, each with WebDataset shards of png, txt
(the English name) and json, whose `concept` is the same for all drawings of one thing and whose
`names` maps languages to names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.reader import DamagedMember
from gigabatch.data.shards.sources import Sources
from gigabatch.launcher.experiments.shards import write_set

TRAIN, ARTIST, CONCEPT = SETS = ("train", "val-artist", "val-concept")
MEMBERS = ("png", "txt", "json")

CONFIG: dict[str, Any] = {
    "data.image": {"size": 32, "channels": 3},
    "batch": {"global_size": 128, "micro_size": 128},
    "towers": {
        "width": 256,
        "image": {"kind": "conv", "widths": [24, 48, 96], "depths": [1, 1, 2]},
        "text": {
            "kind": "conv", "width": 128, "layers": 1, "head": {"layers": 2, "hidden": 512},
        },
    },
    "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
}  # fmt: skip
"""As in configs/emoji.yaml, with half of its batch: more steps in the same time. Augmentation and
dropout are each experiment's own matter."""


@dataclass(frozen=True)
class Drawing:
    png: bytes
    caption: str
    about: dict[str, Any]


def fingerprint(source: Path) -> str:
    """What tells the shards of a folder from others, of their names and sizes. Raises
    GigabatchError where it lacks a set."""
    told = hashlib.sha256()
    for name in SETS:
        shards = sorted((source / name).glob("*.tar"))
        if not shards:
            raise GigabatchError(
                f"--data {source}: there is no {name} with shards (*.tar) in it. Name a folder "
                f"that holds {', '.join(SETS)}, laid out as configs/emoji.yaml says."
            )
        for shard in shards:
            told.update(f"{name}/{shard.name} {shard.stat().st_size}\n".encode())
    return told.hexdigest()[:8]


def drawings(source: Path, name: str) -> list[Drawing]:
    """All samples of a set, in order. Raises GigabatchError, which names the first that lacks
    something."""
    index = open_index(str(source / name))
    index.require_members("png")
    index.require_members("txt")
    index.require_members("json")
    with Sources([index]) as sources:
        found = sources.read(np.arange(len(index)), MEMBERS)
    return [_drawing(index, number, each) for number, each in enumerate(found)]


def _drawing(index: Index, number: int, raw: dict[str, bytes | DamagedMember]) -> Drawing:
    parts: dict[str, bytes] = {}
    for member, data in raw.items():
        if isinstance(data, DamagedMember):
            raise GigabatchError(f"{data.why} Restore the shard.")
        parts[member] = data
    try:
        about = json.loads(parts["json"])
        caption = parts["txt"].decode()
    except ValueError as error:
        raise GigabatchError(f"{index.where(number)} cannot be read: {error}.") from error
    if not isinstance(about, dict) or "concept" not in about:
        raise GigabatchError(
            f"{index.where(number)}: its json has no `concept`, which says what drawings are of "
            "one thing. Add it."
        )
    return Drawing(parts["png"], caption, about)


def write_drawings(
    folder: Path, drawn: list[Drawing], about: list[dict[str, Any]], captions: list[str] | None
) -> None:
    """One set: their pixels as they are, with another json, and captions where there are any."""
    members: dict[str, Any] = {"png": [each.png for each in drawn], "json": about}
    write_set(folder, members | ({"txt": captions} if captions is not None else {}))
