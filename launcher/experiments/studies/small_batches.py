"""iSogCLR: running estimates per sample instead of a large batch, and individual temperatures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import unit, write_set
from gigabatch.launcher.experiments.studies.blocks import noisy_units, two_vector_towers
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

CLASSES, SIZE = 30, 32
TAPS = ["view", "caption"]
FEW = "few"
"""Data kind with fewer samples; a temperature changes only when its sample is in the batch."""


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write pairs near class centers; class k is 1/k as frequent as class 1."""
    centers = unit(random.standard_normal((CLASSES, SIZE)))
    frequency = 1 / np.arange(1, CLASSES + 1)
    for name, count in (("train", 512 if data_kind == FEW else 1024), ("test", 1024)):
        class_of = random.choice(CLASSES, count, p=frequency / frequency.sum())
        latents = noisy_units(random, centers[class_of], 0.2)
        write_set(
            folder / name,
            {
                "image.npy": noisy_units(random, latents, 0.3),
                "text.npy": noisy_units(random, latents, 0.3),
                "json": [{"class": number} for number in class_of],
            },
        )


def _bias(name: str, batch: int, *gamma: str) -> Metric:
    settings = (f"batch={batch}", "temperature=0.05", *gamma)
    return Metric(name, "batch-bias", "test", "batch-bias/relative_error", settings, ("pairs",))


STUDY = Study(
    name="small-batches",
    papers=("iSogCLR",),
    claim="With a running estimate per sample, the gradient of a small batch is as accurate as a "
    "large batch's; learned temperatures of samples rise with the frequency of their class.",
    setting=f"Pairs of {CLASSES} classes; class k is 1/k as frequent as class 1. Bias: relative "
    "error of the expected gradient at temperature 0.05 against that of all 1,024 test pairs. "
    "Correlation: of a class's mean temperature with its log frequency, after 300 visits of each "
    "of 512 training pairs, when the temperatures have converged. (The paper also claims "
    "accuracy, which is not tested here.)",
    write=write,
    config={
        **two_vector_towers("view", "image.npy", "caption", "text.npy", size=SIZE),
        "optimizer": {"lr": 1e-3},
    },
    variants=(
        Variant(
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
            data_kind=FEW,
        ),
        Variant(
            "pairs",
            {
                "objective": {"name": "sogclr", "taps": TAPS, "temperature": 0.05},
                "batch": {"global_size": 128, "micro_size": 128},
                "train.steps": 100,
            },
        ),
    ),
    metrics=(
        Metric(
            "correlation", "table", "train", "table/temperature/log_frequency_correlation",
            ("label=class",), variants=("individual",),
        ),
        _bias("bias, batch 16", 16),
        _bias("bias, batch 128", 128),
        _bias("bias, batch 16, gamma 0.05", 16, "gamma=0.05"),
    ),
    checks=(
        Check(
            "pairs, bias of batch 16 with gamma 0.05 / bias of batch 128",
            lambda mean: mean("pairs", "bias, batch 16, gamma 0.05")
            / mean("pairs", "bias, batch 128"), maximum=1.1,
        ),
        Check(
            "individual, correlation",
            lambda mean: mean("individual", "correlation"), 0.6,
        ),
    ),
)  # fmt: skip
