"""1-to-K on real drawings: names in eight languages per step, compared with English only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.experiments.studies import emoji
from gigabatch.launcher.experiments.studies.emoji import ARTIST, CONCEPT, SETS, TRAIN, Drawing
from gigabatch.launcher.experiments.study import DATA, Check, Metric, Study, Variant

LANGUAGES = ("en", "de", "es", "ru", "ar", "hi", "ja", "zh")
STEPS = 250
LENGTH = 24
VOCABULARY = "vocabulary"


def study(source: Path, fingerprint: str = "") -> Study:
    """Build the study on the sets in `source`; `fingerprint` identifies their shards."""

    def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
        for name in SETS:
            drawings = _with_all_names(emoji.read_drawings(source, name), source / name)
            emoji.write_drawings(folder / name, drawings, list(map(_fields, drawings)), None)
            if name == TRAIN:
                _write_vocabulary(folder / VOCABULARY, drawings)

    captions = {"field": "captions", "choose": "all", "most": len(LANGUAGES)}
    return Study(
        name="emoji-languages",
        papers=("1-to-K",),
        claim="On real drawings too, training on all languages of an image in each step (1-to-K) "
        "makes all languages retrieve it, and equally well.",
        setting=f"Emoji by three artists, with names in {len(LANGUAGES)} languages. Text-to-image "
        "retrieval among the drawings of an unseen artist (val-artist) and of unseen concepts "
        f"(val-concept, four drawings each). english and one-to-k take {STEPS} steps: equal image "
        f"steps, in which one-to-k encodes {len(LANGUAGES)} times as many texts. "
        f"english-{_TIMES}n takes {_TIMES} times the steps: equal texts. random: one language per "
        "step. All variants share a vocabulary trained on all languages. R@k without a language is "
        "the mean over languages. In brackets: 95 % intervals over resampled concepts.",
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
        variants=(
            Variant("english", {}, fingerprint),
            Variant("one-to-k", {"data.captions": captions}, fingerprint),
            Variant(f"english-{_TIMES}n", {"train.steps": _TIMES * STEPS}, fingerprint),
            Variant("random", {"data.captions": {**captions, "choose": "random"}}, fingerprint),
        ),
        metrics=(*_metrics("artist", ARTIST), *_metrics("concept", CONCEPT)),
        checks=CHECKS,
        intervals="concept",
    )


_TIMES = len(LANGUAGES)
AUGMENT = {
    "rotate": 20, "zoom": 0.3, "aspect": 0.25, "shear": 11, "shift": 0.1, "flip": 0.5,
    "contrast": 0.4, "brightness": 0.2, "saturation": 1.0, "hue": 20, "noise": 0.05,
}  # fmt: skip
"""As in configs/emoji.yaml."""


def _metrics(prefix: str, dataset: str) -> list[Metric]:
    fields = [f"names.{language}" for language in LANGUAGES]
    settings = (f"captions=[{', '.join(fields)}]",)

    def metric(name: str, tag: str) -> Metric:
        return Metric(f"{prefix} {name}", "languages", dataset, f"languages/{tag}", settings)

    means = [metric(f"R@{k}", f"t2i_recall@{k}") for k in (10, 1)]
    per_language = [
        metric(f"R@{k}, {language}", f"names.{language}/t2i_recall@{k}")
        for k in (10, 1)
        for language in LANGUAGES
    ]
    return [*means, metric("MRV", "t2i_mrv"), *per_language]


def _with_all_names(drawings: list[Drawing], path: Path) -> list[Drawing]:
    """Keep the drawings with a name in every language.

    Raises:
        GigabatchError: if there are none.
    """
    complete = [
        drawing
        for drawing in drawings
        if isinstance(names := drawing.fields.get("names"), dict) and all(map(names.get, LANGUAGES))
    ]
    if not complete:
        raise GigabatchError(
            f"{path}: no sample's json has `names` in all of {', '.join(LANGUAGES)}. Name a folder "
            "with names in these languages, as configs/emoji.yaml describes."
        )
    return complete


def _fields(drawing: Drawing) -> dict[str, Any]:
    """Build the json of a sample; `captions` is in the order of LANGUAGES, English first."""
    names = {language: drawing.fields["names"][language] for language in LANGUAGES}
    return {
        "concept": drawing.fields["concept"], "names": names, "captions": list(names.values()),
    }  # fmt: skip


def _write_vocabulary(folder: Path, drawings: list[Drawing]) -> None:
    """Train a byte-pair tokenizer on the names in all languages; save it for Hugging Face.

    A run would train a tokenizer on the captions it reads, which in some variants are English only.
    """
    # Imported here, because it imports torch, which takes seconds.
    from gigabatch.data.text.tokenizer import PAD, TextSettings, train_bpe

    names = [drawing.fields["names"][language] for drawing in drawings for language in LANGUAGES]
    tokenizer = train_bpe(names, TextSettings(vocab_size=4096, length=LENGTH))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


CHECKS = (
    Check(
        "one-to-k - english (equal image steps), artist R@10",
        lambda mean: mean("one-to-k", "artist R@10") - mean("english", "artist R@10"), 0.1,
    ),
    Check(
        "one-to-k - english (equal image steps), concept R@10",
        lambda mean: mean("one-to-k", "concept R@10") - mean("english", "concept R@10"), 0.05,
    ),
    Check(
        "one-to-k - english (equal image steps), artist R@10, en",
        lambda mean: mean("one-to-k", "artist R@10, en") - mean("english", "artist R@10, en"),
        -0.05,
    ),
    Check(
        "one-to-k / english (equal image steps), artist MRV",
        lambda mean: mean("one-to-k", "artist MRV") / mean("english", "artist MRV"), maximum=0.5,
    ),
    Check(
        f"one-to-k - english-{_TIMES}n (equal texts), artist R@10",
        lambda mean: mean("one-to-k", "artist R@10") - mean(f"english-{_TIMES}n", "artist R@10"),
        0.05,
    ),
    Check(
        f"one-to-k / english-{_TIMES}n (equal texts), artist MRV",
        lambda mean: mean("one-to-k", "artist MRV") / mean(f"english-{_TIMES}n", "artist MRV"),
        maximum=0.5,
    ),
    Check(
        "one-to-k / random (equal image steps), artist MRV",
        lambda mean: mean("one-to-k", "artist MRV") / mean("random", "artist MRV"), maximum=0.9,
    ),
    Check(
        f"english-{_TIMES}n, artist R@10, en",
        lambda mean: mean(f"english-{_TIMES}n", "artist R@10, en"), 0.35, baseline=True,
    ),
)  # fmt: skip
