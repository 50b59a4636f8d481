"""Grouped positives (39, 51): samples that mean the same must not be each other's negatives."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import write_set
from gigabatch.launcher.experiments.studies.blocks import pair_of_vectors
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

GROUPS, SIZE = 300, 32
TAPS = ["query", "key"]


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    """Half of what a pair has in common is its group's, such as the story of an article and its
    reprints, and half its own."""
    groups = random.standard_normal((GROUPS, SIZE // 2))
    turn = np.linalg.qr(random.standard_normal((SIZE, SIZE))).Q
    for name, of in (
        ("train", random.integers(0, GROUPS, 4096)),
        ("test", np.repeat(np.arange(GROUPS), 5)),
    ):
        own = 0.3 * random.standard_normal((len(of), SIZE // 2))
        whole = np.concatenate([groups[of], own], 1) @ turn
        write_set(
            folder / name,
            {
                "query.npy": whole + 0.5 * random.standard_normal(whole.shape),
                "key.npy": whole + 0.5 * random.standard_normal(whole.shape),
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
        "train.steps": 300,
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
