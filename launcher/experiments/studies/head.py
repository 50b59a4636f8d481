"""The projection head: information that augmentation changes is lost after it, not before it."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gigabatch.launcher.experiments.shards import write_set
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

HUES, SIDE = 8, 16


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write images of rectangles with one hue each.

    Without the hue, images differ only in the positions and sizes of the rectangles.
    """
    for name, count in (("train", 1024), ("test", 512)):
        hues = random.integers(0, HUES, count)
        write_set(
            folder / name,
            {
                "png": [_image(random, hue / HUES) for hue in hues],
                "json": [{"hue": hue} for hue in hues],
            },
        )


def _image(random: np.random.Generator, hue: float) -> bytes:
    color = tuple(int(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.9, 0.9))
    image = Image.new("RGB", (SIDE, SIDE), (60, 60, 60))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = random.integers(1, SIDE - 4, 2).tolist()
        width, height = random.integers(2, 6, 2).tolist()
        draw.rectangle((x, y, x + width, y + height), fill=color)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _probe(name: str, tap: str) -> Metric:
    settings = ("label=hue", "train=train", "modality=image", f"tap={tap}")
    return Metric(name, "probe", "test", "probe/top1", settings)


STUDY = Study(
    name="projection-head",
    papers=("Projection head",),
    claim="The projection head discards what augmentation changes; the layer before it keeps it.",
    setting=f"Images of rectangles of {HUES} hues; augmentation rotates the hue at random in each "
    "view. Accuracy of a linear probe for the hue, before and after the head (chance 0.125).",
    write=write,
    config={
        "data.image": {"size": SIDE},
        "data.augment": {"hue": 180, "shift": 0.05},
        "towers": {
            "width": 32,
            "image": {"kind": "conv", "widths": [16, 32], "depths": [1, 1]},
        },
        "objective": {"name": "supcon", "taps": ["image", "image@1"]},
        "batch": {"global_size": 128, "micro_size": 128},
        "train.steps": 150,
        "optimizer": {"lr": 2e-3},
    },
    variants=(
        Variant("linear"),
        Variant("two-layers", {"towers.image.head": {"layers": 2, "hidden": 128}}),
    ),
    metrics=(_probe("before", "encoder"), _probe("after", "head")),
    checks=(
        Check(
            "linear, accuracy before - after",
            lambda mean: mean("linear", "before") - mean("linear", "after"), 0.3,
        ),
        Check(
            "two-layers, accuracy before - after",
            lambda mean: mean("two-layers", "before") - mean("two-layers", "after"), 0.3,
        ),
    ),
)  # fmt: skip
