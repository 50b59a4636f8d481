"""1-to-K (45): all languages of a picture in one step, and how alike languages then find it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.launcher.experiments.shards import Array, unit, write_set
from gigabatch.launcher.experiments.studies.blocks import vector_tower
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

LANGUAGES = ("en", "de", "ja", "sw")
TRAITS, VALUES, SIZE = 4, 12, 32


def write(folder: Path, random: np.random.Generator, variant: str) -> None:
    """A picture has a value of each trait, and each language a word of its own for each value."""
    seen = unit(random.standard_normal((TRAITS, VALUES, SIZE)))
    for name, count in (("train", 12_800), ("test", 500)):
        drawn = random.integers(0, VALUES, (count, TRAITS))
        pictures = seen[np.arange(TRAITS), drawn].sum(1)
        pictures = pictures + 0.1 * random.standard_normal(pictures.shape)
        write_set(folder / name, {"npy": pictures, "json": list(map(_said, drawn))})


def _said(values: Array) -> dict[str, Any]:
    captions = {
        language: " ".join(_word(i, trait, value) for trait, value in enumerate(values))
        for i, language in enumerate(LANGUAGES)
    }
    return {"captions": captions, **captions}


def _word(language: int, trait: int, value: int) -> str:
    number = (language * TRAITS + trait) * VALUES + int(value)
    syllables = [consonant + vowel for consonant in "bdfgklm" for vowel in "ao"]
    return "".join(syllables[number // 14**place % 14] for place in range(2, -1, -1))


def _captions(**chosen: Any) -> dict[str, Any]:
    return {"data.captions": {"member": "json", **chosen}}


def _measure(figure: str, metric: str) -> Measure:
    settings = (f"captions=[{', '.join(LANGUAGES)}]", "modality=picture")
    return Measure(figure, "languages", "test", f"languages/{metric}", settings)


STUDY = Study(
    name="one-to-k",
    papers=(45,),
    claim="With all languages of a picture in each step (1-to-K), languages find it alike: their "
    "ranks vary less (MRV) than with one language a step.",
    setting=f"Pictures with a caption in each of {len(LANGUAGES)} languages; 500 are searched in "
    "each. Equal image steps, so 1-to-K encodes as many times the texts.",
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
    arms=(
        Arm("pivot", _captions(field="en")),
        Arm("random", _captions(field="captions", choose="random")),
        Arm("one-to-k", _captions(field="captions", choose="all", most=len(LANGUAGES))),
    ),
    measures=(
        _measure("t2i MRV", "text2picture_mrv"),
        *(_measure(f"R@1, {each}", f"{each}/text2picture_recall@1") for each in LANGUAGES),
    ),
    bars=(
        Bar(
            "1-to-K's MRV, of one random language's",
            lambda mean: mean("one-to-k", "t2i MRV") / mean("random", "t2i MRV"), most=0.25,
        ),
        Bar(
            "one random language's R@1 (mean of languages)",
            lambda mean: sum(mean("random", f"R@1, {each}") for each in LANGUAGES)
            / len(LANGUAGES), 0.858, baseline=True,
        ),
    ),
)  # fmt: skip
