"""SupReMix: continuous labels, where the weight of a negative grows with its label distance."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import write_set
from gigabatch.launcher.experiments.studies.blocks import vector_tower
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

LABELS, SIZE = 60, 32


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write samples whose label is encoded as a point on an 8-dimensional curve.

    8 noise dimensions are appended, and a random layer is applied.
    """
    waves = random.uniform(0.5, 2.5, 8), random.uniform(0, 2 * np.pi, 8)
    layer = random.standard_normal((16, SIZE)) / 4
    for name, count in (("train", 3000), ("test", 1000)):
        labels = random.integers(0, LABELS, count)
        curve = np.sin(labels[:, None] / LABELS * 2 * np.pi * waves[0] + waves[1])
        latents = np.concatenate([curve, random.standard_normal((count, 8))], 1)
        vectors = np.tanh(latents @ layer) + 0.1 * random.standard_normal((count, SIZE))
        write_set(folder / name, {"npy": vectors, "json": [{"label": label} for label in labels]})


SHARED = {"taps": ["vector", "vector@1"], "init_logit_scale": 3.3, "learn_scale": False}

STUDY = Study(
    name="label-distance",
    papers=("SupReMix",),
    claim="If negatives count more the farther their label, a linear regression reads the "
    "embedding better than SupCon's.",
    setting=f"Vectors of {LABELS} integer labels on a curve; mean absolute error of a ridge "
    "regression on the frozen embedding.",
    write=write,
    config={
        "towers": {
            "width": 8,
            "more": {"vector": {**vector_tower("npy", SIZE, layers=2), "dropout": 0.1}},
        },
        "batch": {"global_size": 250, "micro_size": 250},
        "train.steps": 300,
        "optimizer": {"lr": 2e-3},
    },
    variants=(
        Variant("simclr", {"objective": {"name": "supcon", **SHARED}}),
        Variant("supcon", {"objective": {"name": "supcon", "positives": "label", **SHARED}}),
        Variant("weighted", {"objective": {"name": "label_distance", "label": "label", **SHARED}}),
    ),
    metrics=(
        Metric(
            "MAE", "probe", "test", "probe/mae",
            ("label=label", "kind=regression", "train=train", "modality=vector"),
        ),
    ),
    checks=(
        Check(
            "weighted / supcon, MAE",
            lambda mean: mean("weighted", "MAE") / mean("supcon", "MAE"), maximum=0.65,
        ),
    ),
)  # fmt: skip
