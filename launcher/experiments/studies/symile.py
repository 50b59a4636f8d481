"""Symile: three bits, where the third may depend only on the other two together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import write_set
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

SHARES = (0.25, 0.5, 0.75, 1.0)
TAPS = ["a", "b", "c"]
PAIRS = [["a", "b"], ["b", "c"], ["a", "c"]]


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write fair bits a and b, and c = a xor b with probability `data_kind`, else a."""
    share = float(data_kind)
    for name, count in (("train", 5_000), ("test", 2_000)):
        a, b = random.integers(0, 2, (2, count))
        c = np.where(random.random(count) < share, a ^ b, a)
        bits = [{"a": x, "b": y, "c": z, "right": y} for x, y, z in zip(a, b, c, strict=True)]
        write_set(folder / name, {"json": bits})


def _variants() -> tuple[Variant, ...]:
    symile = {"objective": {"name": "symile", "taps": TAPS, "keys": "shuffled"}}
    clip = {
        "objective": {"name": "sum", "terms": [{"name": "infonce", "taps": pair} for pair in PAIRS]}
    }
    by_share = tuple(Variant(f"symile-{share:g}", symile, f"{share:g}") for share in SHARES)
    return (*by_share, Variant("clip-1", clip, "1"))


def _near_optimum(share: float) -> Check:
    bayes = (1 + share) / 2
    return Check(
        f"symile-{share:g}, accuracy", lambda mean: mean(f"symile-{share:g}", "accuracy"),
        bayes - 0.03, bayes + 0.03,
    )  # fmt: skip


STUDY = Study(
    name="symile",
    papers=("Symile",),
    claim="Symile captures what three modalities say only together; pairwise CLIP cannot.",
    setting="Bits a, b and c = a xor b with probability p, else a. Accuracy: retrieval of b from a "
    "and c; the optimum is (1 + p) / 2. symile-P and clip-P: trained at p = P.",
    write=write,
    config={
        "towers": {
            "width": 16,
            "more": {
                name: {"kind": "vector", "size": 1, "fields": [name], "width": 16, "layers": 0}
                for name in TAPS
            },
        },
        "batch": {"global_size": 500, "micro_size": 500},
        "train.steps": 100,
        "optimizer": {"lr": 0.1, "weight_decay": 0.0},
    },
    variants=_variants(),
    metrics=(
        Metric(
            "accuracy",
            "retrieval",
            "test",
            "a+c2b_recall@1",
            ("given=[a,c]", "find=b", "positives=right"),
        ),
    ),
    checks=(
        *map(_near_optimum, SHARES),
        Check("clip-1, accuracy", lambda mean: mean("clip-1", "accuracy"), maximum=0.55),
    ),
)
