"""Noisy correspondence (1): some captions shuffled, and how they are memorised."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import write_set
from gigabatch.launcher.experiments.studies.blocks import pair_of_vectors, two_sides
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

NOISE = 0.4
COUNT = 3000


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    """Pairs of one latent seen by two random networks; of the training pairs a share NOISE got
    another's caption."""
    sides = two_sides(random, latent=16, size=128, noise=0.2)
    for name, count in (("train", COUNT), ("test", 1000)):
        image, text = sides(random.standard_normal((count, 16)))
        clean = np.ones(count, int)
        if name == "train":
            wrong = random.permutation(count)[: int(NOISE * count)]
            text[wrong] = text[np.roll(wrong, 1)]  # a cycle: none keeps its own
            clean[wrong] = 0
        flags = [{"clean": each} for each in clean]
        write_set(folder / name, {"image.npy": image, "text.npy": text, "json": flags})


RECALL = "view2caption_recall@1"

STUDY = Study(
    name="noisy-pairs",
    papers=(1,),
    claim="Training that finds out which pairs do not belong together withstands wrong captions, "
    "where plain contrast first learns and then memorises them.",
    setting=f"{COUNT:,} pairs, {NOISE:.0%} of them with another's caption; R@1 among 1,000 clean "
    "test pairs.",
    write=write,
    config={
        **pair_of_vectors("view", "image.npy", "caption", "text.npy", size=128, width=256),
        "batch": {"global_size": 250, "micro_size": 250},
        "train.steps": 360,
        "optimizer": {"lr": 5e-3, "weight_decay": 0.0},
        "schedule.name": "constant",
        "eval": {"sets": ["test"], "every_steps": 72},
    },
    arms=(
        Arm("plain", {"objective": {"name": "infonce", "taps": ["view", "caption"]}}),
        Arm(
            "robust",
            {"objective": {"name": "noisy", "taps": ["view", "caption"], "warmup_epochs": 3}},
        ),
    ),
    measures=(
        Measure("R@1, best", "history", "test", f"{RECALL}/best"),
        Measure("R@1, last", "history", "test", f"{RECALL}/last"),
        Measure(
            "AUC of the split", "table", "train", "table/clean_probability/auc", ("auc=clean",),
            arms=("robust",),
        ),
    ),
    bars=(
        Bar(
            "robust less plain, R@1 of the last step",
            lambda mean: mean("robust", "R@1, last") - mean("plain", "R@1, last"), 0.4,
        ),
        Bar("plain R@1, best", lambda mean: mean("plain", "R@1, best"), 0.69, baseline=True),
        Bar("plain R@1, last", lambda mean: mean("plain", "R@1, last"), 0.24, baseline=True),
    ),
)  # fmt: skip
