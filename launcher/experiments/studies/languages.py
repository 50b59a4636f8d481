"""Same-language negatives (46): what a source has in common must not be what is learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import Array, unit, write_set
from gigabatch.launcher.experiments.studies.blocks import pair_of_vectors
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

LANGUAGES, CONCEPT, SIZE = 3, 24, 64
STRENGTH = 3.0
"""Of what a language adds to every sentence, against the length 1 of what it means."""


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    """A sentence is what it means plus its language. Training pairs neighbouring sentences of one
    language; the test asks for a translation among sentences of all languages."""
    meaning = random.standard_normal((CONCEPT, SIZE)) / np.sqrt(CONCEPT)
    language = STRENGTH * unit(random.standard_normal((LANGUAGES, SIZE)))

    def say(codes: Array, tongue: Array) -> Array:
        heard: Array = codes @ meaning / np.sqrt(SIZE) + language[tongue]
        return heard + 0.02 * random.standard_normal(heard.shape)

    codes, tongue = random.standard_normal((6000, CONCEPT)), random.integers(0, LANGUAGES, 6000)
    near = codes + 1.4 * random.standard_normal(codes.shape)
    of = [{"language": each} for each in tongue]
    write_set(
        folder / "train",
        {"anchor.npy": say(codes, tongue), "near.npy": say(near, tongue), "json": of},
    )
    codes, tongue = random.standard_normal((600, CONCEPT)), random.integers(0, LANGUAGES, 600)
    other = (tongue + random.integers(1, LANGUAGES, 600)) % LANGUAGES
    write_set(folder / "test", {"anchor.npy": say(codes, tongue), "near.npy": say(codes, other)})


TAPS = ["anchor", "near"]

STUDY = Study(
    name="same-language",
    papers=(46,),
    claim="With negatives of all languages a model learns to tell languages apart; with those of "
    "the same language alone it learns what sentences mean, across languages too.",
    setting=f"Sentences of {LANGUAGES} languages, paired within a language; then 600 sentences are "
    "to find their translation among sentences of all languages.",
    write=write,
    config={
        **pair_of_vectors("anchor", "anchor.npy", "near", "near.npy", size=SIZE, layers=0),
        "batch": {"global_size": 256, "micro_size": 256},
        "train.steps": 400,
        "optimizer": {"lr": 3e-3},
    },
    arms=(
        Arm("mixed", {"objective": {"name": "infonce", "taps": TAPS}}),
        Arm("same", {"objective": {"name": "infonce", "taps": TAPS, "within": "language"}}),
    ),
    measures=(Measure("R@1 across", "retrieval", "test", "anchor2near_recall@1"),),
    bars=(
        Bar("same-language negatives, R@1", lambda mean: mean("same", "R@1 across"), 0.9),
        Bar("mixed negatives, R@1", lambda mean: mean("mixed", "R@1 across"), most=0.3),
        Bar("mixed negatives, R@1", lambda mean: mean("mixed", "R@1 across"), 0.066, baseline=True),
    ),
)
