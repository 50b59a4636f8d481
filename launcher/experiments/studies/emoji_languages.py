"""1-to-K (45) on real drawings and their names: eight languages a step against English alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.tokenizer import PAD, TextSettings, train_bpe
from gigabatch.launcher.experiments.studies import emoji
from gigabatch.launcher.experiments.studies.emoji import ARTIST, CONCEPT, SETS, TRAIN, Drawing
from gigabatch.launcher.experiments.study import DATA, Arm, Bar, Measure, Study

LANGUAGES = ("en", "de", "es", "ru", "ar", "hi", "ja", "zh")
STEPS = 250
LENGTH = 24
VOCABULARY = "vocabulary"


def study(source: Path, fingerprint: str = "") -> Study:
    """On the sets in `source`, whose shards are those of the `fingerprint`."""

    def write(folder: Path, random: np.random.Generator, variant: str) -> None:
        for name in SETS:
            drawn = _named_in_all(emoji.drawings(source, name), source / name)
            emoji.write_drawings(folder / name, drawn, list(map(_about, drawn)), None)
            if name == TRAIN:
                _write_vocabulary(folder / VOCABULARY, drawn)

    captions = {"field": "captions", "choose": "all", "most": len(LANGUAGES)}
    return Study(
        name="emoji-languages",
        papers=(45,),
        claim="On real drawings too, all languages of a picture in each step (1-to-K) let every "
        "language find it, and find it alike.",
        setting=f"Emoji of three artists with their names in {len(LANGUAGES)} languages; text to "
        "image, among the drawings of an artist (val-artist) and of concepts (val-concept, four "
        f"drawings of each) never seen. english and one-to-k take {STEPS} steps, equal image "
        f"steps, of which one-to-k encodes {len(LANGUAGES)} times the texts; english-{_TIMES}n "
        "takes as many times the steps, equal texts; random: one language a step. All share a "
        "vocabulary, trained on all languages. R@k without a language is the mean over them. In "
        "brackets 95 % intervals over resampled concepts.",
        write=write,
        config={
            **emoji.CONFIG,
            "data.captions": {"field": "captions"},
            "data.text": {"tokenizer": f"{DATA}/{VOCABULARY}", "length": LENGTH},
            "data.augment": AUGMENT,
            "towers.image.dropout": 0.2,
            "objective": {"positives": "concept"},
            "train.steps": STEPS,
        },
        arms=(
            Arm("english", {}, fingerprint),
            Arm("one-to-k", {"data.captions": captions}, fingerprint),
            Arm(f"english-{_TIMES}n", {"train.steps": _TIMES * STEPS}, fingerprint),
            Arm("random", {"data.captions": {**captions, "choose": "random"}}, fingerprint),
        ),
        measures=(*_measures("artist", ARTIST), *_measures("concept", CONCEPT)),
        bars=BARS,
        intervals="concept",
    )


_TIMES = len(LANGUAGES)
AUGMENT = {
    "rotate": 20, "zoom": 0.3, "aspect": 0.25, "shear": 11, "shift": 0.1, "flip": 0.5,
    "contrast": 0.4, "brightness": 0.2, "saturation": 1.0, "hue": 20, "noise": 0.05,
}  # fmt: skip
"""That of configs/emoji.yaml."""


def _measures(of: str, on: str) -> list[Measure]:
    named = [f"names.{language}" for language in LANGUAGES]
    settings = (f"captions=[{', '.join(named)}]",)

    def measure(figure: str, metric: str) -> Measure:
        return Measure(f"{of} {figure}", "languages", on, f"languages/{metric}", settings)

    whole = [measure(f"R@{k}", f"t2i_recall@{k}") for k in (10, 1)]
    each = [
        measure(f"R@{k}, {language}", f"names.{language}/t2i_recall@{k}")
        for k in (10, 1)
        for language in LANGUAGES
    ]
    return [*whole, measure("MRV", "t2i_mrv"), *each]


def _named_in_all(drawn: list[Drawing], where: Path) -> list[Drawing]:
    found = [
        each
        for each in drawn
        if isinstance(names := each.about.get("names"), dict) and all(map(names.get, LANGUAGES))
    ]
    if not found:
        raise GigabatchError(
            f"{where}: no sample's json has `names` in all of {', '.join(LANGUAGES)}. Name a "
            "folder laid out as configs/emoji.yaml says, with names in these languages."
        )
    return found


def _about(drawing: Drawing) -> dict[str, Any]:
    """`captions`: in the order of LANGUAGES, so that the first is English."""
    names = {language: drawing.about["names"][language] for language in LANGUAGES}
    return {
        "concept": drawing.about["concept"], "names": names, "captions": list(names.values()),
    }  # fmt: skip


def _write_vocabulary(folder: Path, drawn: list[Drawing]) -> None:
    """Byte pairs of the names in all languages, as a Hugging Face tokeniser's folder: a run trains
    its own on the captions that it takes, which are English alone in some."""
    names = [drawing.about["names"][language] for drawing in drawn for language in LANGUAGES]
    found = train_bpe(names, TextSettings(vocab_size=4096, length=LENGTH))
    folder.mkdir()
    found.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


BARS = (
    Bar(
        "equal image steps: 1-to-K's R@10 (mean of languages) less English-only's, artist",
        lambda mean: mean("one-to-k", "artist R@10") - mean("english", "artist R@10"), 0.1,
    ),
    Bar(
        "equal image steps: 1-to-K's R@10 (mean of languages) less English-only's, concept",
        lambda mean: mean("one-to-k", "concept R@10") - mean("english", "concept R@10"), 0.05,
    ),
    Bar(
        "equal image steps: 1-to-K's English R@10 less English-only's, artist",
        lambda mean: mean("one-to-k", "artist R@10, en") - mean("english", "artist R@10, en"),
        -0.05,
    ),
    Bar(
        "equal image steps: 1-to-K's MRV, of English-only's, artist",
        lambda mean: mean("one-to-k", "artist MRV") / mean("english", "artist MRV"), most=0.5,
    ),
    Bar(
        "equal texts: 1-to-K's R@10 (mean of languages) less English-only's, artist",
        lambda mean: mean("one-to-k", "artist R@10") - mean(f"english-{_TIMES}n", "artist R@10"),
        0.05,
    ),
    Bar(
        "equal texts: 1-to-K's MRV, of English-only's, artist",
        lambda mean: mean("one-to-k", "artist MRV") / mean(f"english-{_TIMES}n", "artist MRV"),
        most=0.5,
    ),
    Bar(
        "equal image steps: 1-to-K's MRV, of one random language's, artist",
        lambda mean: mean("one-to-k", "artist MRV") / mean("random", "artist MRV"), most=0.9,
    ),
    Bar(
        "English-only of equal texts, English R@10, artist",
        lambda mean: mean(f"english-{_TIMES}n", "artist R@10, en"), 0.35, baseline=True,
    ),
)  # fmt: skip
