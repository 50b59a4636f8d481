"""Order (36): post-training with reversed captions as hard negatives, with and without replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.launcher.experiments.shards import Array, unit, write_set
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

EVENTS, SIZE = 40, 32
CONSONANTS = "bdfgklmnprst"


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    """Old: three events in some order, whose caption lists them in any. New: two events, with
    `right` and `wrong`, which changes the order."""
    heard = unit(random.standard_normal((EVENTS, SIZE)))

    def sounds(events: Array) -> Array:
        return heard[events] + 0.1 * random.standard_normal((*events.shape, SIZE))

    for name, count in (("old", 6000), ("old-test", 500)):
        events = np.argsort(random.random((count, EVENTS)), 1)[:, :3]
        listed = random.permuted(events, axis=1)
        captions = [{"captions": [" and ".join(map(_name, each))]} for each in listed]
        write_set(folder / name, {"npy": sounds(events), "json": captions})
    for name, count in (("new", 6000), ("new-test", 500)):
        events = np.argsort(random.random((count, EVENTS)), 1)[:, :2]
        write_set(folder / name, {"npy": sounds(events), "json": list(map(_ordered, events))})


def _name(event: int) -> str:
    """A word of its own, of two syllables."""
    return "".join(
        "bdfgklmnprst"[i] + vowel for i, vowel in zip(divmod(event, 12), "ao", strict=True)
    )


def _ordered(events: Array) -> dict[str, Any]:
    first, second = map(_name, events)
    right, wrong = f"{first} before {second}", f"{second} before {first}"
    return {"captions": [right, wrong], "right": right, "wrong": wrong}


NEGATIVES = {
    "objective": {"name": "hard_negatives", "taps": ["sound", "text"], "own_weight": 2.0},
    "data.captions.choose": "all",
    "data.captions.most": 2,
    "train.steps": 250,
    "optimizer.lr": 1e-3,
}

STUDY = Study(
    name="order",
    papers=(36,),
    claim="Post-training with reversed captions as negatives teaches the order of events; what was "
    "learnt before is kept where old pairs are mixed in.",
    setting=f"Sequences of {EVENTS} kinds of event. Order: a caption against the reversed one. Old "
    "captions list three events in any order; 500 are searched.",
    write=write,
    config={
        "data.train": "old",
        "data.captions": {"member": "json", "field": "captions", "choose": "first"},
        "data.text": {"vocab_size": 400, "length": 12},
        "towers": {
            "width": 64,
            "text": {"kind": "conv", "width": 64, "layers": 1},
            "more": {
                "sound": {
                    "kind": "sequence", "size": SIZE, "length": 3, "width": 64, "layers": 1,
                }
            },
        },
        "batch": {"global_size": 128, "micro_size": 128},
        "train.steps": 500,
        "optimizer": {"lr": 2e-3},
    },
    arms=(
        Arm("before", {"objective": {"name": "infonce", "taps": ["sound", "text"]}}),
        Arm("no-replay", {**NEGATIVES, "data.train": "new"}, begins_with="before"),
        Arm("replay", {**NEGATIVES, "data.train": ["old", "new"]}, begins_with="before"),
    ),
    measures=(
        Measure(
            "order accuracy", "order", "new-test", "order/order_accuracy",
            ("captions=right", "against=wrong", "modality=sound"),
        ),
        Measure("old R@1", "retrieval", "old-test", "text2sound_recall@1"),
    ),
    bars=(
        Bar("order accuracy with replay", lambda mean: mean("replay", "order accuracy"), 0.95),
        Bar(
            "old-caption R@1 with replay, of what it was",
            lambda mean: mean("replay", "old R@1") / mean("before", "old R@1"), 0.9,
        ),
        Bar("old-caption R@1 before", lambda mean: mean("before", "old R@1"), 0.813, baseline=True),
    ),
)  # fmt: skip
