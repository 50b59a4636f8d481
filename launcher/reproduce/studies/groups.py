"""Grouped positives (39, 51): samples that mean the same must not be each other's negatives."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.reproduce.shards import unit, write_set
from gigabatch.launcher.reproduce.studies.blocks import around, pair_of_vectors
from gigabatch.launcher.reproduce.study import Arm, Bar, Measure, Study

GROUPS, SIZE = 300, 32
TAPS = ["query", "key"]


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    """Pairs about the centres of groups, such as reprints of an article; of the test, five each."""
    centres = unit(random.standard_normal((GROUPS, SIZE)))
    for name, of in (
        ("train", random.integers(0, GROUPS, 4096)),
        ("test", np.repeat(np.arange(GROUPS), 5)),
    ):
        own = around(random, centres[of], 1.0)  # what is the pair's alone
        write_set(
            folder / name,
            {
                "query.npy": around(random, own, 0.5),
                "key.npy": around(random, own, 0.5),
                "json": [{"group": each} for each in of],
            },
        )


def _infonce(**more: str) -> dict[str, object]:
    return {"objective": {"name": "infonce", "taps": TAPS, **more}}


STUDY = Study(
    name="groups",
    papers=(39, 51),
    claim="Samples of one group, left out of each other's negatives or taken as right answers, are "
    "found together better than where they are pushed apart.",
    setting=f"Pairs of {GROUPS} groups; R-precision among 1,500 pairs, five of each group.",
    write=write,
    config={
        **pair_of_vectors("query", "query.npy", "key", "key.npy", size=SIZE),
        "batch": {"global_size": 128, "micro_size": 128},
        "train.steps": 600,
        "optimizer": {"lr": 2e-3},
    },
    arms=(
        Arm("infonce", _infonce()),
        Arm("masked", _infonce(positives="group", same_id="exclude")),
        Arm("grouped", _infonce(positives="group")),
    ),
    measures=(
        Measure(
            "R-precision", "retrieval", "test", "query2key_r_precision", ("positives=group",)
        ),
    ),
    bars=(
        Bar(
            "masked (39) less InfoNCE, R-precision",
            lambda mean: mean("masked", "R-precision") - mean("infonce", "R-precision"), 0.05,
        ),
        Bar(
            "grouped (51) less InfoNCE, R-precision",
            lambda mean: mean("grouped", "R-precision") - mean("infonce", "R-precision"), 0.05,
        ),
        Bar(
            "InfoNCE R-precision", lambda mean: mean("infonce", "R-precision"), 0.714, baseline=True
        ),
    ),
)  # fmt: skip
