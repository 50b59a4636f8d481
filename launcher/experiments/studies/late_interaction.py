"""FILIP (25): images of many parts, of which a caption names a few."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import unit, write_set
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

CONCEPTS, WIDTH = 200, 32
PATCHES, WORDS, SHARED = 12, 4, 3


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    """A concept's vector as a word is that as a patch, turned. Patches and words of a sample stand
    in any order, under noise."""
    patch = unit(random.standard_normal((CONCEPTS, WIDTH)))
    word = patch @ np.linalg.qr(random.standard_normal((WIDTH, WIDTH))).Q
    for name, count in (("train", 4096), ("test", 512)):
        drawn = np.argsort(random.random((count, CONCEPTS)), 1)  # distinct within a sample
        seen = drawn[:, :PATCHES]
        told = np.concatenate([drawn[:, :SHARED], drawn[:, PATCHES : PATCHES + WORDS - SHARED]], 1)
        noise = 0.1 * random.standard_normal((count, PATCHES + WORDS, WIDTH))
        patches = random.permuted(seen, axis=1)
        write_set(
            folder / name,
            {
                "patches.npy": patch[patches] + noise[:, :PATCHES],
                "words.npy": word[random.permuted(told, axis=1)] + noise[:, PATCHES:],
            },
        )


def _tower(member: str, length: int) -> dict[str, object]:
    """Each vector by itself; the mean of them is the pooled vector."""
    shape = {"size": WIDTH, "length": length, "width": 64, "layers": 0}
    return {"kind": "set", "member": f"{member}.npy", **shape}


STUDY = Study(
    name="late-interaction",
    papers=(25,),
    claim="Scores of tokens, each with its best match (MaxSim), find what one pooled vector loses.",
    setting=f"Images of {PATCHES} patches and captions of {WORDS} words share {SHARED} of "
    f"{CONCEPTS} concepts; 512 images are searched by caption.",
    write=write,
    config={
        "towers": {
            "width": 64,
            "more": {"patches": _tower("patches", PATCHES), "words": _tower("words", WORDS)},
        },
        "batch": {"global_size": 128, "micro_size": 128},
        "train.steps": 200,
        "optimizer": {"lr": 1e-2},
    },
    arms=(
        Arm("pooled", {"objective": {"name": "infonce", "taps": ["patches", "words"]}}),
        Arm(
            "maxsim",
            {"objective": {"name": "late_interaction", "taps": ["patches.tokens", "words.tokens"]}},
        ),
    ),
    measures=(
        Measure("t2i R@1", "retrieval", "test", "words2patches_recall@1"),
        Measure("i2t R@1", "retrieval", "test", "patches2words_recall@1"),
    ),
    bars=(
        Bar(
            "MaxSim less pooled, t2i R@1",
            lambda mean: mean("maxsim", "t2i R@1") - mean("pooled", "t2i R@1"), 0.4,
        ),
        Bar("pooled t2i R@1", lambda mean: mean("pooled", "t2i R@1"), 0.03, baseline=True),
    ),
)  # fmt: skip
