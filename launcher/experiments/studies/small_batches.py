"""iSogCLR (14): a running estimate for each sample in place of a large batch, and temperatures of
samples that follow how frequent they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import unit, write_set
from gigabatch.launcher.experiments.studies.blocks import around, pair_of_vectors
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

CLASSES, SIZE = 30, 32
TAPS = ["view", "caption"]
FEW = "few"
"""The data of the temperatures, each of which moves only when its sample is visited."""


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    """Pairs about the centres of classes of which the k-th is 1/k as frequent as the first."""
    centres = unit(random.standard_normal((CLASSES, SIZE)))
    share = 1 / np.arange(1, CLASSES + 1)
    for name, count in (("train", 512 if variant == FEW else 1024), ("test", 1024)):
        of = random.choice(CLASSES, count, p=share / share.sum())
        own = around(random, centres[of], 0.2)
        write_set(
            folder / name,
            {
                "image.npy": around(random, own, 0.3),
                "text.npy": around(random, own, 0.3),
                "json": [{"class": each} for each in of],
            },
        )


def _bias(figure: str, batch: int, *gamma: str) -> Measure:
    settings = (f"batch={batch}", "temperature=0.05", *gamma)
    return Measure(figure, "batch-bias", "test", "batch-bias/relative_error", settings, ("pairs",))


STUDY = Study(
    name="small-batches",
    papers=(14,),
    claim="A running estimate for each sample makes the gradient of a small batch as true as a "
    "large batch's; learnt temperatures of samples rise with how frequent what they show is.",
    setting=f"Pairs of {CLASSES} classes, the k-th 1/k as frequent as the first. Bias: the error "
    "of the expected gradient at temperature 0.05 against that of all 1,024 test pairs. "
    "Temperatures: after 300 visits of each of 512 training pairs, when they have settled. (The "
    "paper also claims accuracy, which the catalogue's measurements do not bear out.)",
    write=write,
    config={
        **pair_of_vectors("view", "image.npy", "caption", "text.npy", size=SIZE),
        "optimizer": {"lr": 1e-3},
    },
    arms=(
        Arm(
            "individual",
            {
                "objective": {
                    "name": "sogclr", "taps": TAPS, "temperatures": "individual",
                    "temperature": 0.2, "temperature_min": 0.05, "temperature_max": 0.7,
                    "rho": 0.3, "gamma": 0.9, "temperature_lr": 0.05,
                },
                "batch": {"global_size": 256, "micro_size": 256},
                "train.steps": 600,
            },
            data=FEW,
        ),
        Arm(
            "pairs",
            {
                "objective": {"name": "sogclr", "taps": TAPS, "temperature": 0.05},
                "batch": {"global_size": 128, "micro_size": 128},
                "train.steps": 100,
            },
        ),
    ),
    measures=(
        Measure(
            "correlation", "table", "train", "table/temperature/log_frequency_correlation",
            ("label=class",), arms=("individual",),
        ),
        _bias("bias, batch 16", 16),
        _bias("bias, batch 128", 128),
        _bias("bias, batch 16, gamma 0.05", 16, "gamma=0.05"),
    ),
    bars=(
        Bar(
            "bias at batch 16 with gamma 0.05, of batch 128's",
            lambda mean: mean("pairs", "bias, batch 16, gamma 0.05")
            / mean("pairs", "bias, batch 128"), most=1.1,
        ),
        Bar(
            "correlation of a class's mean temperature with its log frequency",
            lambda mean: mean("individual", "correlation"), 0.6,
        ),
    ),
)  # fmt: skip
