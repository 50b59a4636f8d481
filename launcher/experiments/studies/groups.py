"""Grouped positives: samples of one group as positives, or excluded from the negatives."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import write_set
from gigabatch.launcher.experiments.studies.blocks import two_vector_towers
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

GROUPS, SIZE = 300, 32
TAPS = ["query", "key"]


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write pairs with a shared latent; half of its dimensions are its group's, half its own.

    A group is like the story that an article and its reprints share.
    """
    groups = random.standard_normal((GROUPS, SIZE // 2))
    rotation = np.linalg.qr(random.standard_normal((SIZE, SIZE))).Q
    for name, group_of in (
        ("train", random.integers(0, GROUPS, 4096)),
        ("test", np.repeat(np.arange(GROUPS), 5)),
    ):
        unique_part = 0.3 * random.standard_normal((len(group_of), SIZE // 2))
        common = np.concatenate([groups[group_of], unique_part], 1) @ rotation
        write_set(
            folder / name,
            {
                "query.npy": common + 0.5 * random.standard_normal(common.shape),
                "key.npy": common + 0.5 * random.standard_normal(common.shape),
                "json": [{"group": group} for group in group_of],
            },
        )


def _infonce(**settings: str) -> dict[str, object]:
    return {"objective": {"name": "infonce", "taps": TAPS, **settings}}


STUDY = Study(
    name="groups",
    papers=("MultiCSR", "HEADLINES"),
    claim="Retrieval of samples of one group improves if they are positives (HEADLINES) or "
    "excluded from each other's negatives (MultiCSR).",
    setting=f"Pairs of {GROUPS} groups; R-precision among 1,500 pairs, five of each group. "
    "masked: MultiCSR; grouped: HEADLINES.",
    write=write,
    config={
        **two_vector_towers("query", "query.npy", "key", "key.npy", size=SIZE),
        "batch": {"global_size": 128, "micro_size": 128},
        "train.steps": 300,
        "optimizer": {"lr": 2e-3},
    },
    variants=(
        Variant("infonce", _infonce()),
        Variant("masked", _infonce(positives="group", same_id="exclude")),
        Variant("grouped", _infonce(positives="group")),
    ),
    metrics=(
        Metric("R-precision", "retrieval", "test", "query2key_r_precision", ("positives=group",)),
    ),
    checks=(
        Check(
            "masked - infonce, R-precision",
            lambda mean: mean("masked", "R-precision") - mean("infonce", "R-precision"), 0.05,
        ),
        Check(
            "grouped - infonce, R-precision",
            lambda mean: mean("grouped", "R-precision") - mean("infonce", "R-precision"), 0.05,
        ),
        Check(
            "infonce, R-precision", lambda mean: mean("infonce", "R-precision"), 0.714,
            baseline=True,
        ),
    ),
)  # fmt: skip
