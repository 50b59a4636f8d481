"""Noisy correspondence: shuffled captions, and how models memorize them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import write_set
from gigabatch.launcher.experiments.studies.blocks import random_view_pair, two_vector_towers
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

NOISE = 0.4
COUNT = 3000


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write two views of latent vectors; a share NOISE of the training pairs is mismatched."""
    view_pair = random_view_pair(random, latent=16, size=128, noise=0.2)
    for name, count in (("train", COUNT), ("test", 1000)):
        image, text = view_pair(random.standard_normal((count, 16)))
        clean = np.ones(count, int)
        if name == "train":
            noisy = random.permutation(count)[: int(NOISE * count)]
            text[noisy] = text[np.roll(noisy, 1)]  # one cycle, so that every caption moves
            clean[noisy] = 0
        flags = [{"clean": flag} for flag in clean]
        write_set(folder / name, {"image.npy": image, "text.npy": text, "json": flags})


RECALL = "view2caption_recall@1"

STUDY = Study(
    name="noisy-pairs",
    papers=("PC2, noisy correspondence",),
    claim="Training that detects mismatched pairs resists wrong captions, which plain contrastive "
    "training memorizes after it has learned the correct ones.",
    setting=f"{COUNT:,} pairs, {NOISE:.0%} with the caption of another pair; R@1 among 1,000 clean "
    "test pairs.",
    write=write,
    config={
        **two_vector_towers("view", "image.npy", "caption", "text.npy", size=128, width=256),
        "batch": {"global_size": 250, "micro_size": 250},
        "train.steps": 360,
        "optimizer": {"lr": 5e-3, "weight_decay": 0.0},
        "schedule.name": "constant",
        "eval": {"sets": ["test"], "every_steps": 72},
    },
    variants=(
        Variant("plain", {"objective": {"name": "infonce", "taps": ["view", "caption"]}}),
        Variant(
            "robust",
            {"objective": {"name": "noisy", "taps": ["view", "caption"], "warmup_epochs": 3}},
        ),
    ),
    metrics=(
        Metric("best R@1", "history", "test", f"{RECALL}/best"),
        Metric("final R@1", "history", "test", f"{RECALL}/last"),
        Metric(
            "AUC of the split", "table", "train", "table/clean_probability/auc", ("auc=clean",),
            variants=("robust",),
        ),
    ),
    checks=(
        Check(
            "robust - plain, final R@1",
            lambda mean: mean("robust", "final R@1") - mean("plain", "final R@1"), 0.4,
        ),
        Check("plain, best R@1", lambda mean: mean("plain", "best R@1"), 0.69, baseline=True),
        Check("plain, final R@1", lambda mean: mean("plain", "final R@1"), 0.24, baseline=True),
    ),
)  # fmt: skip
