"""1-to-K: all languages of an image in one step, which makes their retrieval ranks similar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.launcher.experiments.shards import Array, unit, write_set
from gigabatch.launcher.experiments.studies.blocks import vector_tower
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

LANGUAGES = ("en", "de", "ja", "sw")
TRAITS, VALUES, SIZE = 4, 12, 32


def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
    """Write pictures with one value per trait; each language has a word for each value."""
    value_vectors = unit(random.standard_normal((TRAITS, VALUES, SIZE)))
    for name, count in (("train", 12_800), ("test", 500)):
        values = random.integers(0, VALUES, (count, TRAITS))
        pictures = value_vectors[np.arange(TRAITS), values].sum(1)
        pictures = pictures + 0.1 * random.standard_normal(pictures.shape)
        write_set(folder / name, {"npy": pictures, "json": list(map(_captions_of, values))})


def _captions_of(values: Array) -> dict[str, Any]:
    captions = {
        language: " ".join(_word(i, trait, value) for trait, value in enumerate(values))
        for i, language in enumerate(LANGUAGES)
    }
    return {"captions": captions, **captions}


def _word(language: int, trait: int, value: int) -> str:
    """Spell a unique word of three syllables."""
    number = (language * TRAITS + trait) * VALUES + int(value)
    syllables = [consonant + vowel for consonant in "bdfgklm" for vowel in "ao"]
    return "".join(syllables[number // 14**place % 14] for place in range(2, -1, -1))


def _captions(**settings: Any) -> dict[str, Any]:
    return {"data.captions": {"member": "json", **settings}}


def _metric(name: str, tag: str) -> Metric:
    settings = (f"captions=[{', '.join(LANGUAGES)}]", "modality=picture")
    return Metric(name, "languages", "test", f"languages/{tag}", settings)


STUDY = Study(
    name="one-to-k",
    papers=("1-to-K",),
    claim="With all languages of an image in each step (1-to-K), languages retrieve it alike: "
    "their mean rank variance (MRV) is lower than with one language per step.",
    setting=f"Pictures with a caption in each of {len(LANGUAGES)} languages; text-to-image "
    "retrieval among 500 in each language. All variants take equal image steps, so 1-to-K encodes "
    f"{len(LANGUAGES)} times as many texts.",
    write=write,
    config={
        "data.text": {"vocab_size": 700, "length": 16},
        "towers": {
            "width": 64,
            "text": {"kind": "conv", "width": 64, "layers": 1},
            "more": {"picture": vector_tower("npy", SIZE)},
        },
        "objective": {"name": "infonce", "taps": ["picture", "text"]},
        "batch": {"global_size": 128, "micro_size": 128},
        "train.steps": 90,
        "optimizer": {"lr": 2e-3},
    },
    variants=(
        Variant("pivot", _captions(field="en")),
        Variant("random", _captions(field="captions", choose="random")),
        Variant("one-to-k", _captions(field="captions", choose="all", most=len(LANGUAGES))),
    ),
    metrics=(
        _metric("t2i MRV", "text2picture_mrv"),
        *(_metric(f"R@1, {language}", f"{language}/text2picture_recall@1")
          for language in LANGUAGES),
    ),
    checks=(
        Check(
            "one-to-k / random, t2i MRV",
            lambda mean: mean("one-to-k", "t2i MRV") / mean("random", "t2i MRV"), maximum=0.25,
        ),
        Check(
            "random, R@1 (mean over languages)",
            lambda mean: sum(mean("random", f"R@1, {language}") for language in LANGUAGES)
            / len(LANGUAGES), 0.858, baseline=True,
        ),
    ),
)  # fmt: skip
