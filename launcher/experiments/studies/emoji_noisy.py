"""Noisy correspondence (1) on real drawings: some names exchanged, and how they are memorised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.experiments.studies import emoji
from gigabatch.launcher.experiments.studies.emoji import ARTIST, CONCEPT, SETS, TRAIN
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

NOISE = 0.4
STEPS, EPOCH = 960, 32


def study(source: Path, fingerprint: str = "") -> Study:
    """On the sets in `source`, whose shards are those of the `fingerprint`."""

    def write(folder: Path, random: np.random.Generator, variant: str) -> None:
        for name in SETS:
            drawn = emoji.drawings(source, name)
            concepts = [each.about["concept"] for each in drawn]
            captions = [each.caption for each in drawn]
            clean = np.ones(len(drawn), int)
            if name == TRAIN:
                wrong, instead = exchanged(concepts, random, source / name)
                clean[wrong] = 0
                theirs = [captions[other] for other in instead]
                for here, caption in zip(wrong, theirs, strict=True):
                    captions[here] = caption
            about = [
                {"concept": concept, "clean": flag}
                for concept, flag in zip(concepts, clean, strict=True)
            ]
            emoji.write_drawings(folder / name, drawn, about, captions)

    return Study(
        name="emoji-noisy",
        papers=(1,),
        claim="On real drawings too, training that finds out which names do not belong to their "
        "drawing withstands wrong ones, where plain contrast memorises them.",
        setting=f"Emoji of three artists, {NOISE:.0%} of them with the name of another concept; "
        "text to image, among the drawings of an artist (val-artist) and of concepts (val-concept) "
        f"never seen, whose names are right. {STEPS} steps, {STEPS // EPOCH} epochs at one "
        "learning rate, flips and small moves as the only augmentation and no dropout: "
        "time to memorise. "
        "Both take the pair alone as right in training, since wrong names would spread over a "
        "concept. In brackets 95 % intervals over resampled concepts, of what was measured after "
        "the last step.",
        write=write,
        config={
            **emoji.CONFIG,
            "data.text": {"vocab_size": 2048, "length": 16},
            "data.augment": {"flip": 0.5, "shift": 0.05},
            "train.steps": STEPS,
            "schedule.name": "constant",
            "eval": {"sets": [ARTIST], "every_steps": 3 * EPOCH},
        },
        arms=(
            Arm("plain", {"objective": {"name": "infonce"}}, fingerprint),
            Arm("robust", {"objective": {"name": "noisy", "warmup_epochs": 5}}, fingerprint),
        ),
        measures=(
            Measure("artist R@10, best", "history", ARTIST, "t2i_recall@10/best"),
            _last("artist R@10, last", ARTIST, 10),
            _last("artist R@1, last", ARTIST, 1),
            _last("concept R@10, last", CONCEPT, 10),
            Measure(
                "AUC of the split", "table", TRAIN, "table/clean_probability/auc", ("auc=clean",),
                arms=("robust",),
            ),
        ),
        bars=BARS,
        intervals="concept",
    )  # fmt: skip


def _last(figure: str, on: str, k: int) -> Measure:
    return Measure(figure, "retrieval", on, f"t2i_recall@{k}", ("positives=concept",))


def exchanged(
    concepts: list[Any], random: np.random.Generator, where: Path
) -> tuple[list[int], list[int]]:
    """(samples, whose caption each gets instead): a share NOISE of all, by a permutation of these
    that leaves none with a caption of its own concept. Raises GigabatchError where there is none.
    """
    wrong = random.permutation(len(concepts))[: int(NOISE * len(concepts))]
    names, of = np.unique([str(concepts[i]) for i in wrong], return_inverse=True)
    # By concepts, in an order of chance, then moved on by the size of the largest: out of its own.
    order = np.argsort(random.permutation(len(names))[of], kind="stable")
    most = int(np.bincount(of).max(initial=0))
    if not len(wrong) or 2 * most > len(wrong):
        raise GigabatchError(
            f"{where}: its {len(concepts)} samples are of too few concepts for {NOISE:.0%} of the "
            "captions to be exchanged among others. Name a larger set."
        )
    here, instead = wrong[order], np.roll(wrong[order], -most)
    return here.tolist(), instead.tolist()


BARS = (
    Bar(
        "robust less plain, artist R@10 of the last step",
        lambda mean: mean("robust", "artist R@10, last") - mean("plain", "artist R@10, last"), 0.02,
    ),
    Bar(
        "robust less plain, concept R@10 of the last step",
        lambda mean: mean("robust", "concept R@10, last") - mean("plain", "concept R@10, last"),
        0.0,
    ),
    Bar("AUC of the split", lambda mean: mean("robust", "AUC of the split"), 0.7),
    Bar(
        "plain artist R@10, best less last",
        lambda mean: mean("plain", "artist R@10, best") - mean("plain", "artist R@10, last"),
        0.02, baseline=True,
    ),
)  # fmt: skip
