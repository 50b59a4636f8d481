"""Same-language negatives, which make a model learn meanings instead of languages."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigabatch.launcher.experiments.shards import Array, unit, write_set
from gigabatch.launcher.experiments.studies.blocks import two_vector_towers
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

LANGUAGES, LATENT, SIZE = 3, 24, 64
LANGUAGE_NORM = 3.0
"""Length of the vector that a language adds to each sentence; that of the meaning is about 1."""


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write sentences as the sum of a meaning vector and a language vector.

    Training pairs have similar meanings in one language; test pairs are translations.
    """
    meaning_map = random.standard_normal((LATENT, SIZE)) / np.sqrt(LATENT)
    language_vectors = LANGUAGE_NORM * unit(random.standard_normal((LANGUAGES, SIZE)))

    def sentences(meanings: Array, language: Array) -> Array:
        vectors: Array = meanings @ meaning_map / np.sqrt(SIZE) + language_vectors[language]
        return vectors + 0.02 * random.standard_normal(vectors.shape)

    meanings, language = random.standard_normal((6000, LATENT)), random.integers(0, LANGUAGES, 6000)
    similar = meanings + 1.4 * random.standard_normal(meanings.shape)
    write_set(
        folder / "train",
        {
            "anchor.npy": sentences(meanings, language),
            "near.npy": sentences(similar, language),
            "json": [{"language": number} for number in language],
        },
    )
    meanings, language = random.standard_normal((600, LATENT)), random.integers(0, LANGUAGES, 600)
    other = (language + random.integers(1, LANGUAGES, 600)) % LANGUAGES
    pairs = {"anchor.npy": sentences(meanings, language), "near.npy": sentences(meanings, other)}
    write_set(folder / "test", pairs)


TAPS = ["anchor", "near"]

STUDY = Study(
    name="same-language",
    papers=("CCP, multilingual retrieval",),
    claim="With negatives from all languages, a model learns to tell languages apart; with "
    "negatives from the same language only, it learns meanings, across languages too.",
    setting=f"Sentences of {LANGUAGES} languages, paired within a language. R@1 across: retrieval "
    "of the translations of 600 sentences among sentences of all languages.",
    write=write,
    config={
        **two_vector_towers("anchor", "anchor.npy", "near", "near.npy", size=SIZE, layers=0),
        "batch": {"global_size": 256, "micro_size": 256},
        "train.steps": 400,
        "optimizer": {"lr": 3e-3},
    },
    variants=(
        Variant("mixed", {"objective": {"name": "infonce", "taps": TAPS}}),
        Variant("same", {"objective": {"name": "infonce", "taps": TAPS, "within": "language"}}),
    ),
    metrics=(Metric("R@1 across", "retrieval", "test", "anchor2near_recall@1"),),
    checks=(
        Check("same, R@1 across", lambda mean: mean("same", "R@1 across"), 0.9),
        Check("mixed, R@1 across", lambda mean: mean("mixed", "R@1 across"), maximum=0.3),
        Check("mixed, R@1 across", lambda mean: mean("mixed", "R@1 across"), 0.066, baseline=True),
    ),
)
