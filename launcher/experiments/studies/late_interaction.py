"""FILIP: images with many parts, and captions that name a few of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import unit, write_set
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

CONCEPTS, WIDTH = 200, 32
PATCHES, WORDS, SHARED = 12, 4, 3


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write sets of patch vectors and word vectors, in random order, with noise.

    A concept's word vector is its patch vector, rotated.
    """
    patch = unit(random.standard_normal((CONCEPTS, WIDTH)))
    word = patch @ np.linalg.qr(random.standard_normal((WIDTH, WIDTH))).Q
    for name, count in (("train", 4096), ("test", 512)):
        concepts = np.argsort(random.random((count, CONCEPTS)), 1)  # distinct within a sample
        shown = concepts[:, :PATCHES]
        named = np.concatenate(
            [concepts[:, :SHARED], concepts[:, PATCHES : PATCHES + WORDS - SHARED]], 1
        )
        noise = 0.1 * random.standard_normal((count, PATCHES + WORDS, WIDTH))
        patches = random.permuted(shown, axis=1)
        write_set(
            folder / name,
            {
                "patches.npy": patch[patches] + noise[:, :PATCHES],
                "words.npy": word[random.permuted(named, axis=1)] + noise[:, PATCHES:],
            },
        )


def _tower(member: str, length: int) -> dict[str, object]:
    """Return the config of a set tower that has no attention layers and pools by the mean."""
    shape = {"size": WIDTH, "length": length, "width": 64, "layers": 0}
    return {"kind": "set", "member": f"{member}.npy", **shape}


STUDY = Study(
    name="late-interaction",
    papers=("FILIP",),
    claim="Token-wise scores, where each token takes its best match (MaxSim), retrieve what one "
    "pooled vector loses.",
    setting=f"Images of {PATCHES} patches and captions of {WORDS} words share {SHARED} of "
    f"{CONCEPTS} concepts; retrieval among 512 pairs, text to image (t2i) and image to text (i2t).",
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
    variants=(
        Variant("pooled", {"objective": {"name": "infonce", "taps": ["patches", "words"]}}),
        Variant(
            "maxsim",
            {"objective": {"name": "late_interaction", "taps": ["patches.tokens", "words.tokens"]}},
        ),
    ),
    metrics=(
        Metric("t2i R@1", "retrieval", "test", "words2patches_recall@1"),
        Metric("i2t R@1", "retrieval", "test", "patches2words_recall@1"),
    ),
    checks=(
        Check(
            "maxsim - pooled, t2i R@1",
            lambda mean: mean("maxsim", "t2i R@1") - mean("pooled", "t2i R@1"), 0.4,
        ),
        Check("pooled, t2i R@1", lambda mean: mean("pooled", "t2i R@1"), 0.03, baseline=True),
    ),
)  # fmt: skip
