"""The modality gap (32): at a low temperature the two modalities lie apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.reproduce.shards import write_set
from gigabatch.launcher.reproduce.studies.blocks import pair_of_vectors, two_sides
from gigabatch.launcher.reproduce.study import Arm, Bar, Measure, Study


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    sides = two_sides(random, latent=16, size=64)
    for name, count in (("train", 4096), ("test", 1000)):
        image, text = sides(random.standard_normal((count, 16)))
        write_set(folder / name, {"image.npy": image, "text.npy": text})


def _arm(temperature: float) -> Arm:
    fixed = {"scale": 1 / temperature, "learn_scale": False}
    objective = {"name": "infonce", "taps": ["view", "caption"], **fixed}
    return Arm(f"t-{temperature:g}", {"objective": objective})


STUDY = Study(
    name="modality-gap",
    papers=(32,),
    claim="Embeddings of two modalities lie apart, the more so the lower the temperature.",
    setting="Pairs of vectors; the gap is the distance between the two modalities' means.",
    write=write,
    config={
        **pair_of_vectors("view", "image.npy", "caption", "text.npy", size=64, layers=2),
        "batch": {"global_size": 128, "micro_size": 128},
        "train.steps": 300,
        "optimizer": {"lr": 1e-3},
    },
    arms=(_arm(0.02), _arm(0.07)),
    measures=(
        Measure("gap", "geometry", "test", "geometry/modality_gap"),
        Measure("domain AUC", "geometry", "test", "geometry/domain_auc"),
    ),
    bars=(
        Bar(
            "gap at temperature 0.02 less at 0.07",
            lambda mean: mean("t-0.02", "gap") - mean("t-0.07", "gap"), 0.3,
        ),
    ),
)  # fmt: skip
