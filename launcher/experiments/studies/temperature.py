"""Temperature: lower values make embeddings more uniform and less tolerant of similarity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import unit, write_set
from gigabatch.launcher.experiments.studies.blocks import noisy_units, vector_tower
from gigabatch.launcher.experiments.study import Check, Formula, MeanOf, Metric, Study, Variant

TEMPERATURES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
CLASSES, SIZE = 20, 32
DROPOUT = 0.6


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write vectors of overlapping classes."""
    centers = unit(random.standard_normal((CLASSES, SIZE)))
    for name, count in (("train", 2000), ("test", 1000)):
        labels = random.integers(0, CLASSES, count)
        vectors = noisy_units(random, centers[labels], 1.0)
        write_set(folder / name, {"npy": vectors, "json": [{"label": label} for label in labels]})


def _variant(temperature: float) -> Variant:
    scale = {"init_logit_scale": 1 / temperature, "learn_scale": False}
    objective = {"name": "supcon", "taps": ["vector", "vector@1"], **scale}
    return Variant(f"t-{temperature:g}", {"objective": objective})


def _rank_correlation(metric: str) -> Formula:
    """Return Spearman's correlation between temperature and a metric's mean, without ties."""

    def correlation(mean: MeanOf) -> float:
        values = np.array([mean(f"t-{t:g}", metric) for t in TEMPERATURES])
        ranks = values.argsort().argsort()
        return float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])

    return correlation


STUDY = Study(
    name="temperature",
    papers=("Behaviour of contrastive loss",),
    claim="A lower temperature spreads embeddings more evenly, and keeps samples of one class less "
    "similar.",
    setting=f"{CLASSES} overlapping classes, two views by a dropout of {DROPOUT}, no labels in "
    "training. Tolerance: mean cosine within a class. (With views that differ less, every sample "
    "is soon told apart from all others, and the lowest temperature has no gradient left.)",
    write=write,
    config={
        "towers": {
            "width": 32,
            "more": {"vector": {**vector_tower("npy", SIZE, layers=2), "dropout": DROPOUT}},
        },
        "batch": {"global_size": 128, "micro_size": 128},
        "train.steps": 250,
        "optimizer": {"lr": 4e-3},
    },
    variants=tuple(map(_variant, TEMPERATURES)),
    metrics=(
        Metric("tolerance", "geometry", "test", "geometry/vector_tolerance", ("label=label",)),
        Metric("uniformity", "geometry", "test", "geometry/vector_uniformity", ("label=label",)),
    ),
    checks=(
        Check(
            "all variants, Spearman correlation of temperature and tolerance",
            _rank_correlation("tolerance"),
            0.95,
        ),
    ),
)
