"""Symile (34): three bits of which no two tell anything of the third."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import write_set
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

SHARES = (0.25, 0.5, 0.75, 1.0)
TAPS = ["a", "b", "c"]
PAIRS = [["a", "b"], ["b", "c"], ["a", "c"]]


def write(folder: Path, random: np.random.Generator, share: str) -> None:
    """a, b fair bits; c = a xor b with probability `share`, else a."""
    for name, count in (("train", 5_000), ("test", 2_000)):
        a, b = random.integers(0, 2, (2, count))
        c = np.where(random.random(count) < float(share), a ^ b, a)
        bits = [{"a": x, "b": y, "c": z, "right": y} for x, y, z in zip(a, b, c, strict=True)]
        write_set(folder / name, {"json": bits})


def _arms() -> tuple[Arm, ...]:
    symile = {"objective": {"name": "symile", "taps": TAPS, "keys": "shuffled"}}
    clip = {
        "objective": {"name": "sum", "terms": [{"name": "infonce", "taps": pair} for pair in PAIRS]}
    }
    shares = tuple(Arm(f"symile-{share:g}", symile, f"{share:g}") for share in SHARES)
    return (*shares, Arm("clip-1", clip, "1"))


def _near(share: float) -> Bar:
    bayes = (1 + share) / 2
    return Bar(
        f"Symile's accuracy at p = {share:g}", lambda mean: mean(f"symile-{share:g}", "accuracy"),
        bayes - 0.03, bayes + 0.03,
    )  # fmt: skip


STUDY = Study(
    name="symile",
    papers=(34,),
    claim="Symile captures what three modalities tell only together, which pairwise CLIP cannot.",
    setting="Bits a, b and c = a xor b with probability p, else a; b is to be found from a and c. "
    "The best possible accuracy is (1 + p) / 2.",
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
    arms=_arms(),
    measures=(
        Measure(
            "accuracy",
            "retrieval",
            "test",
            "a+c2b_recall@1",
            ("given=[a,c]", "find=b", "positives=right"),
        ),
    ),
    bars=(
        *map(_near, SHARES),
        Bar("pairwise CLIP's at p = 1", lambda mean: mean("clip-1", "accuracy"), most=0.55),
    ),
)
