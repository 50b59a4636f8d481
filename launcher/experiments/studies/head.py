"""The projection head (18): what augmentation hides is lost behind it, and kept before it."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gigabatch.launcher.experiments.shards import write_set
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

COLOURS, SIDE = 8, 16


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    """A blob of some hue at some place, which is what tells images apart once hue is hidden."""
    for name, count in (("train", 1024), ("test", 512)):
        hues = random.integers(0, COLOURS, count)
        write_set(
            folder / name,
            {
                "png": [_image(random, hue / COLOURS) for hue in hues],
                "json": [{"hue": each} for each in hues],
            },
        )


def _image(random: np.random.Generator, hue: float) -> bytes:
    colour = tuple(int(255 * each) for each in colorsys.hsv_to_rgb(hue, 0.9, 0.9))
    image = Image.new("RGB", (SIDE, SIDE), (60, 60, 60))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = random.integers(1, SIDE - 4, 2).tolist()
        wide, high = random.integers(2, 6, 2).tolist()
        draw.rectangle((x, y, x + wide, y + high), fill=colour)
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def _probe(figure: str, tap: str) -> Measure:
    settings = ("label=hue", "train=train", "modality=image", f"tap={tap}")
    return Measure(figure, "probe", "test", "probe/top1", settings)


STUDY = Study(
    name="projection-head",
    papers=(18,),
    claim="What augmentation hides is thrown away behind the projection head, and is still there "
    "before it.",
    setting=f"Pictures of rectangles of {COLOURS} hues, whose hue is turned at random in each "
    "view; a linear probe is to tell the hue (by chance 0.125).",
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
    arms=(Arm("linear"), Arm("two-layers", {"towers.image.head": {"layers": 2, "hidden": 128}})),
    measures=(_probe("before", "encoder"), _probe("behind", "head")),
    bars=(
        Bar(
            "linear head: accuracy before less behind",
            lambda mean: mean("linear", "before") - mean("linear", "behind"), 0.3,
        ),
        Bar(
            "two-layer head: accuracy before less behind",
            lambda mean: mean("two-layers", "before") - mean("two-layers", "behind"), 0.3,
        ),
    ),
)  # fmt: skip
