"""TeminAL: post-training with reversed captions as hard negatives, with and without replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.launcher.experiments.shards import Array, unit, write_set
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

EVENTS, SIZE = 40, 32


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write old and new pairs of event sequences and captions.

    Old: three events; the caption lists them in random order. New: two events, with captions
    `right` and `wrong`, which reverses their order.
    """
    event_vectors = unit(random.standard_normal((EVENTS, SIZE)))

    def sounds(events: Array) -> Array:
        return event_vectors[events] + 0.1 * random.standard_normal((*events.shape, SIZE))

    for name, count in (("old", 6000), ("old-test", 500)):
        events = np.argsort(random.random((count, EVENTS)), 1)[:, :3]
        listed = random.permuted(events, axis=1)
        captions = [{"captions": [" and ".join(map(_word, row))]} for row in listed]
        write_set(folder / name, {"npy": sounds(events), "json": captions})
    for name, count in (("new", 6000), ("new-test", 500)):
        events = np.argsort(random.random((count, EVENTS)), 1)[:, :2]
        write_set(folder / name, {"npy": sounds(events), "json": list(map(_ordered, events))})


def _word(event: int) -> str:
    """Spell a unique word of two syllables."""
    return "".join(
        "bdfgklmnprst"[i] + vowel for i, vowel in zip(divmod(event, 12), "ao", strict=True)
    )


def _ordered(events: Array) -> dict[str, Any]:
    first, second = map(_word, events)
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
    papers=("TeminAL",),
    claim="Post-training with reversed captions as negatives teaches the order of events; mixing "
    "in old pairs preserves what the model had learned.",
    setting=f"Sequences of {EVENTS} kinds of event. Order accuracy: a caption against its reverse. "
    "Old R@1: captions that list three events in any order, retrieval among 500. replay mixes in "
    "old pairs.",
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
    variants=(
        Variant("before", {"objective": {"name": "infonce", "taps": ["sound", "text"]}}),
        Variant("no-replay", {**NEGATIVES, "data.train": "new"}, init_from="before"),
        Variant("replay", {**NEGATIVES, "data.train": ["old", "new"]}, init_from="before"),
    ),
    metrics=(
        Metric(
            "order accuracy", "order", "new-test", "order/order_accuracy",
            ("captions=right", "against=wrong", "modality=sound"),
        ),
        Metric("old R@1", "retrieval", "old-test", "text2sound_recall@1"),
    ),
    checks=(
        Check("replay, order accuracy", lambda mean: mean("replay", "order accuracy"), 0.95),
        Check(
            "replay / before, old R@1",
            lambda mean: mean("replay", "old R@1") / mean("before", "old R@1"), 0.9,
        ),
        Check("before, old R@1", lambda mean: mean("before", "old R@1"), 0.813, baseline=True),
    ),
)  # fmt: skip
