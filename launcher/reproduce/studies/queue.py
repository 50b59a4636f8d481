"""A queue (6): negatives for small batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.reproduce.shards import write_set
from gigabatch.launcher.reproduce.studies.blocks import pair_of_vectors, two_sides
from gigabatch.launcher.reproduce.study import Arm, Bar, Measure, Study

TAPS = ["code", "comment"]


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    sides = two_sides(random, latent=32, size=64, noise=0.6)
    for name, count in (("train", 8000), ("test", 1000)):
        code, comment = sides(random.standard_normal((count, 32)))
        write_set(folder / name, {"code.npy": code, "comment.npy": comment})


def _queue(size: int) -> dict[str, object]:
    return {"objective": {"name": "queue", "taps": TAPS, "size": size, "momentum": 0.999}}


STUDY = Study(
    name="queue",
    papers=(6,),
    claim="A queue of earlier samples, as a momentum tower saw them, makes up for small batches.",
    setting="Pairs of vectors, eight a batch; R@1 among 1,000.",
    write=write,
    config={
        **pair_of_vectors("code", "code.npy", "comment", "comment.npy", size=64),
        "batch": {"global_size": 8, "micro_size": 8},
        "train.steps": 1500,
        "optimizer": {"lr": 1e-3},
    },
    arms=(
        Arm("batch-8", {"objective": {"name": "infonce", "taps": TAPS}}),
        Arm("queue-512", _queue(512)),
    ),
    measures=(Measure("R@1", "retrieval", "test", "code2comment_recall@1"),),
    bars=(
        Bar(
            "with a queue of 512 less without, R@1",
            lambda mean: mean("queue-512", "R@1") - mean("batch-8", "R@1"), 0.05,
        ),
        Bar("batch of 8, R@1", lambda mean: mean("batch-8", "R@1"), 0.48, baseline=True),
    ),
)  # fmt: skip
