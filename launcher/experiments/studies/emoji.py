"""Parts shared by the studies on real drawings: functions that read the drawings, small towers.

The data folder contains `train`, `val-artist` and `val-concept`. Each has WebDataset shards of png,
txt (the English name) and json. Drawings of the same thing share the json field `concept`; the
field `names` maps languages to names.
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
"""As in configs/emoji.yaml, with half its batch, for more steps in the same time. Augmentation and
dropout differ by study."""


@dataclass(frozen=True)
class Drawing:
    png: bytes
    caption: str
    fields: dict[str, Any]
    """The sample's json."""


def fingerprint(source: Path) -> str:
    """Hash the names and sizes of a data folder's shards, to tell data folders apart.

    Raises:
        GigabatchError: if a set is missing.
    """
    digest = hashlib.sha256()
    for name in SETS:
        shards = sorted((source / name).glob("*.tar"))
        if not shards:
            raise GigabatchError(
                f"--data {source}: it has no folder {name} with shards (*.tar). Name a folder that "
                f"contains {', '.join(SETS)}, as configs/emoji.yaml describes."
            )
        for shard in shards:
            digest.update(f"{name}/{shard.name} {shard.stat().st_size}\n".encode())
    return digest.hexdigest()[:8]


def read_drawings(source: Path, name: str) -> list[Drawing]:
    """Read all samples of a set, in order.

    Raises:
        GigabatchError: if a sample is damaged or lacks a member; names the first such sample.
    """
    index = open_index(str(source / name))
    index.require_members("png")
    index.require_members("txt")
    index.require_members("json")
    with Sources([index]) as sources:
        samples = sources.read(np.arange(len(index)), MEMBERS)
    return [_drawing(index, number, members) for number, members in enumerate(samples)]


def _drawing(index: Index, number: int, members: dict[str, bytes | DamagedMember]) -> Drawing:
    parts: dict[str, bytes] = {}
    for member, data in members.items():
        if isinstance(data, DamagedMember):
            raise GigabatchError(f"{data.why} Restore the shard.")
        parts[member] = data
    try:
        fields = json.loads(parts["json"])
        caption = parts["txt"].decode()
    except ValueError as error:
        raise GigabatchError(f"{index.where(number)} cannot be read: {error}.") from error
    if not isinstance(fields, dict) or "concept" not in fields:
        raise GigabatchError(
            f"{index.where(number)}: its json has no field `concept`. Add it; drawings of the "
            "same thing share its value."
        )
    return Drawing(parts["png"], caption, fields)


def write_drawings(
    folder: Path, drawings: list[Drawing], fields: list[dict[str, Any]], captions: list[str] | None
) -> None:
    """Write one set: the drawings' original pixels with new json and, if any, new captions."""
    members: dict[str, Any] = {"png": [drawing.png for drawing in drawings], "json": fields}
    write_set(folder, members | ({"txt": captions} if captions is not None else {}))
