"""Temperature (5): the smaller, the more uniform and the less tolerant of what is alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import unit, write_set
from gigabatch.launcher.experiments.studies.blocks import around, vector_tower
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Of, Study

TEMPERATURES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
CLASSES, SIZE = 20, 32
DROPOUT = 0.6


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    """Classes that overlap."""
    centres = unit(random.standard_normal((CLASSES, SIZE)))
    for name, count in (("train", 2000), ("test", 1000)):
        of = random.integers(0, CLASSES, count)
        vectors = around(random, centres[of], 1.0)
        write_set(folder / name, {"npy": vectors, "json": [{"label": each} for each in of]})


def _arm(temperature: float) -> Arm:
    scale = {"init_logit_scale": 1 / temperature, "learn_scale": False}
    objective = {"name": "supcon", "taps": ["vector", "vector@1"], **scale}
    return Arm(f"t-{temperature:g}", {"objective": objective})


def _rank_correlation(figure: str) -> Of:
    """Spearman's, of the temperature and the mean of a figure. (No two values are equal.)"""

    def of(mean: object) -> float:
        assert callable(mean)
        values = np.array([mean(f"t-{each:g}", figure) for each in TEMPERATURES])
        ranks = values.argsort().argsort()
        return float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])

    return of


STUDY = Study(
    name="temperature",
    papers=(5,),
    claim="A smaller temperature spreads embeddings evenly and tolerates less that samples of one "
    "class are alike.",
    setting=f"{CLASSES} overlapping classes, two views by a dropout of {DROPOUT}, no labels in "
    "training; tolerance is the mean cosine within a class. (Views that differ less are told from "
    "all others at once, and at the lowest temperature nothing is left to learn: "
    "docs/engineering-log.md.)",
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
    arms=tuple(map(_arm, TEMPERATURES)),
    measures=(
        Measure("tolerance", "geometry", "test", "geometry/vector_tolerance", ("label=label",)),
        Measure("uniformity", "geometry", "test", "geometry/vector_uniformity", ("label=label",)),
    ),
    bars=(Bar("Spearman of temperature and tolerance", _rank_correlation("tolerance"), 0.95),),
)
