"""Noisy correspondence on real drawings: shuffled names, and how models memorize them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.experiments.studies import emoji
from gigabatch.launcher.experiments.studies.emoji import ARTIST, CONCEPT, SETS, TRAIN
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

NOISE = 0.4
STEPS, EPOCH = 960, 32


def study(source: Path, fingerprint: str = "") -> Study:
    """Build the study on the sets in `source`; `fingerprint` identifies their shards."""

    def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
        for name in SETS:
            drawings = emoji.read_drawings(source, name)
            concepts = [drawing.fields["concept"] for drawing in drawings]
            captions = [drawing.caption for drawing in drawings]
            clean = np.ones(len(drawings), int)
            if name == TRAIN:
                noisy, donors = shuffled_captions(concepts, random, source / name)
                clean[noisy] = 0
                new_captions = [captions[donor] for donor in donors]
                for sample, caption in zip(noisy, new_captions, strict=True):
                    captions[sample] = caption
            fields = [
                {"concept": concept, "clean": flag}
                for concept, flag in zip(concepts, clean, strict=True)
            ]
            emoji.write_drawings(folder / name, drawings, fields, captions)

    return Study(
        name="emoji-noisy",
        papers=("PC2, noisy correspondence",),
        claim="On real drawings too, training that detects mismatched pairs resists wrong names, "
        "which plain contrastive training memorizes.",
        setting=f"Emoji by three artists; {NOISE:.0%} have the name of another concept. "
        "Text-to-image retrieval among the drawings of an unseen artist (val-artist) and of unseen "
        f"concepts (val-concept), with correct names. {STEPS} steps, {STEPS // EPOCH} epochs at a "
        "constant learning rate, with flips and small shifts as the only augmentation and no "
        "dropout, which leaves time to memorize. In training, both variants take only the pair "
        "itself as a positive; otherwise a wrong name would spread to its whole concept. In "
        "brackets: 95 % intervals over resampled concepts, for metrics after the last step.",
        write=write,
        config={
            **emoji.CONFIG,
            "data.text": {"vocab_size": 2048, "length": 16},
            "data.augment": {"flip": 0.5, "shift": 0.05},
            "train.steps": STEPS,
            "schedule.name": "constant",
            "eval": {"sets": [ARTIST], "every_steps": 3 * EPOCH},
        },
        variants=(
            Variant("plain", {"objective": {"name": "infonce"}}, fingerprint),
            Variant("robust", {"objective": {"name": "noisy", "warmup_epochs": 5}}, fingerprint),
        ),
        metrics=(
            Metric("best artist R@10", "history", ARTIST, "t2i_recall@10/best"),
            _final("final artist R@10", ARTIST, 10),
            _final("final artist R@1", ARTIST, 1),
            _final("final concept R@10", CONCEPT, 10),
            Metric(
                "AUC of the split", "table", TRAIN, "table/clean_probability/auc", ("auc=clean",),
                variants=("robust",),
            ),
        ),
        checks=CHECKS,
        intervals="concept",
    )  # fmt: skip


def _final(name: str, dataset: str, k: int) -> Metric:
    return Metric(name, "retrieval", dataset, f"t2i_recall@{k}", ("positives=concept",))


def shuffled_captions(
    concepts: list[Any], random: np.random.Generator, path: Path
) -> tuple[list[int], list[int]]:
    """Permute the captions of a random share NOISE of the samples, always to a different concept.

    Args:
        concepts: Concept of each sample.
        random: Random generator.
        path: Path of the set, for messages.

    Returns:
        (chosen samples, for each the sample whose caption it receives).

    Raises:
        GigabatchError: if there are too few concepts for such a permutation.
    """
    chosen = random.permutation(len(concepts))[: int(NOISE * len(concepts))]
    names, concept_of = np.unique([str(concepts[i]) for i in chosen], return_inverse=True)
    # Sort the samples by concept, in random order of concepts. A rotation by the size of the
    # largest concept then moves every caption out of its concept.
    order = np.argsort(random.permutation(len(names))[concept_of], kind="stable")
    largest = int(np.bincount(concept_of).max(initial=0))
    if not len(chosen) or 2 * largest > len(chosen):
        raise GigabatchError(
            f"{path}: its {len(concepts)} samples have too few concepts to exchange {NOISE:.0%} of "
            "the captions between concepts. Name a larger set."
        )
    samples, donors = chosen[order], np.roll(chosen[order], -largest)
    return samples.tolist(), donors.tolist()


CHECKS = (
    Check(
        "robust - plain, final artist R@10",
        lambda mean: mean("robust", "final artist R@10") - mean("plain", "final artist R@10"), 0.02,
    ),
    Check(
        "robust - plain, final concept R@10",
        lambda mean: mean("robust", "final concept R@10") - mean("plain", "final concept R@10"),
        0.0,
    ),
    Check("robust, AUC of the split", lambda mean: mean("robust", "AUC of the split"), 0.7),
    Check(
        "plain, best - final artist R@10",
        lambda mean: mean("plain", "best artist R@10") - mean("plain", "final artist R@10"),
        0.02, baseline=True,
    ),
)  # fmt: skip
