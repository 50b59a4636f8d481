"""The experiments on real drawings, run on a few synthetic drawings in the same layout."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cli.reproduce import reproduce
from gigabatch.launcher.experiments import report
from gigabatch.launcher.experiments.run import Outcome, run_study
from gigabatch.launcher.experiments.studies import STUDIES, emoji_languages, real_data_studies
from gigabatch.launcher.experiments.studies.emoji_noisy import shuffled_captions
from gigabatch.launcher.experiments.study import Estimate, Study

ARTISTS = {"train": ("a", "b", "c"), "val-artist": ("d",), "val-concept": ("a", "b", "c", "d")}
CONCEPTS = {"train": range(12), "val-artist": range(12), "val-concept": range(12, 16)}
WITHOUT_CHINESE = "c_5"


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the sets of ARTISTS and CONCEPTS; one drawing has no Chinese name."""
    source = tmp_path_factory.mktemp("drawings")
    for name in ARTISTS:
        _write_set(source / name, ARTISTS[name], CONCEPTS[name])
    return source


def _write_set(folder: Path, artists: tuple[str, ...], concepts: range) -> None:
    folder.mkdir()
    with wds.TarWriter(str(folder / f"{folder.name}-0.tar"), mtime=0) as writer:
        for concept in concepts:
            for artist in artists:
                names = {lang: f"{lang}{concept} thing" for lang in emoji_languages.LANGUAGES}
                names |= {"sw": "another language"}
                if f"{artist}_{concept}" == WITHOUT_CHINESE:
                    del names["zh"]
                pixels = np.full((8, 8, 3), (16 * concept, ord(artist), 255 - 9 * concept))
                png = BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(png, "png")
                fields = {"concept": concept, "names": names, "artist": artist}
                writer.write(
                    {"__key__": f"{artist}_{concept}", "png": png.getvalue(), "json": fields,
                     "txt": f"en{concept} thing"}
                )  # fmt: skip


def _study(name: str, source: Path | None) -> Study:
    (study,) = (study for study in real_data_studies(source) if study.name == name)
    return study


def _read(folder: Path) -> list[dict[str, Any]]:
    shards = sorted(map(str, folder.glob("*.tar")))
    return list(wds.WebDataset(shards, shardshuffle=False))


def test_languages_study_writes_names_in_all_languages_and_one_vocabulary(
    drawings: Path, tmp_path: Path
) -> None:
    study = _study("emoji-languages", drawings)
    for seed in (0, 1):
        study.write(tmp_path / str(seed), np.random.default_rng(seed), "")
    counts = {name: len(_read(tmp_path / "0" / name)) for name in ARTISTS}
    assert counts == {"train": 35, "val-artist": 12, "val-concept": 16}  # one has no Chinese name
    sources = [s for s in _read(drawings / "train") if not s["__key__"].endswith(WITHOUT_CHINESE)]
    for sample, source in zip(_read(tmp_path / "0" / "train"), sources, strict=True):
        fields, before = json.loads(sample["json"]), json.loads(source["json"])
        assert sample["png"] == source["png"]
        assert fields["concept"] == before["concept"]
        assert fields["captions"] == [before["names"][x] for x in emoji_languages.LANGUAGES]
        assert fields["names"] == {lang: before["names"][lang] for lang in fields["names"]}
        assert fields["captions"][0] == source["txt"].decode()
    files = [tmp_path / str(seed) / "vocabulary" / "tokenizer.json" for seed in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_noisy_study_shuffles_training_captions_between_concepts(
    drawings: Path, tmp_path: Path
) -> None:
    study = _study("emoji-noisy", drawings)
    for copy, seed in (("a", 0), ("b", 0), ("c", 1)):
        study.write(tmp_path / copy, np.random.default_rng(seed), "")
    first, repeated, other = (
        [(sample["txt"], sample["json"]) for sample in _read(tmp_path / copy / "train")]
        for copy in ("a", "b", "c")
    )
    assert first == repeated != other
    for name in ARTISTS:
        samples, sources = _read(tmp_path / "a" / name), _read(drawings / name)
        assert [s["png"] for s in samples] == [s["png"] for s in sources]
        assert Counter(s["txt"] for s in samples) == Counter(s["txt"] for s in sources)
        fields = [json.loads(sample["json"]) for sample in samples]
        names = [f"en{field['concept']} thing" for field in fields]
        matched = [s["txt"].decode() == name for s, name in zip(samples, names, strict=True)]
        assert [field["clean"] for field in fields] == matched
        assert matched.count(False) == (int(0.4 * len(samples)) if name == "train" else 0)


def test_shuffled_captions_never_stay_in_their_concept() -> None:
    random = np.random.default_rng(0)
    concepts = [0] * 30 + [1] * 10 + list(range(2, 70))
    for _ in range(50):
        samples, donors = shuffled_captions(concepts, random, Path("set"))
        assert sorted(samples) == sorted(donors)
        assert all(concepts[a] != concepts[b] for a, b in zip(samples, donors, strict=True))
    with pytest.raises(GigabatchError, match=r"set: its 9 samples have too few concepts to .* 40%"):
        shuffled_captions([1] * 8 + [2], random, Path("set"))


def _short(study: Study, **config: Any) -> Study:
    variants = tuple(
        replace(v, config={**v.config, **({"train.steps": 3} if "train.steps" in v.config else {})})
        for v in study.variants
    )
    tower = {"towers.image.widths": [8, 8], "towers.image.depths": [1, 1], "data.image.size": 8}
    small = {"train.steps": 2, "batch": {"global_size": 8, "micro_size": 8}, **tower, **config}
    return replace(study, config={**study.config, **small}, variants=variants)


@pytest.mark.slow
def test_both_studies_train_and_report_metrics_with_intervals(
    drawings: Path, tmp_path: Path
) -> None:
    study = _short(_study("emoji-languages", drawings))
    outcome = run_study(study, 1, tmp_path, lambda _: None, lambda: False)
    estimate = outcome.results["one-to-k"]["concept R@10"]
    assert estimate.low is not None
    assert estimate.high is not None
    assert 0 < estimate.low <= estimate.mean <= estimate.high
    per_language = [outcome.results["random"][f"artist R@10, {lang}"].mean
                    for lang in emoji_languages.LANGUAGES]  # fmt: skip
    mean = outcome.results["random"]["artist R@10"].mean
    assert mean == pytest.approx(np.mean(per_language))
    vocabularies = {path.read_bytes() for path in tmp_path.glob("runs/*/tokenizer.json")}
    assert len(vocabularies) == 1
    assert "Ġja" in json.loads(vocabularies.pop())["model"]["vocab"]

    noisy = _short(
        _study("emoji-noisy", drawings), **{"train.steps": 10, "eval.every_steps": 5},
        **{"data.text.vocab_size": 300},
    )  # fmt: skip
    robust_variant = replace(noisy.variants[1], config={"objective": {"name": "noisy"}})
    noisy = replace(noisy, variants=(noisy.variants[0], robust_variant))
    outcome = run_study(noisy, 1, tmp_path, lambda _: None, lambda: False)
    baseline, robust = outcome.results["plain"], outcome.results["robust"]
    assert baseline["best artist R@10"].mean >= baseline["final artist R@10"].mean
    assert baseline["best artist R@10"].low is None  # the embeddings of that step were not kept
    assert 0 <= robust["AUC of the split"].mean <= 1
    lines = report.table_lines(report.as_json(outcome)["results"])
    assert "[" in next(line for line in lines if line.startswith("robust"))


@pytest.mark.slow
def test_runs_on_other_drawings_are_rejected(drawings: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ARTISTS:
        _write_set(other / name, ARTISTS[name], range(14))
    for source, rejected in ((drawings, False), (other, True)):
        study = _short(_study("emoji-noisy", source), **{"data.text.vocab_size": 300})
        study = replace(
            study, variants=study.variants[:1], metrics=study.metrics[1:2], checks=()
        )  # fmt: skip
        if rejected:
            with pytest.raises(GigabatchError, match=r"different version .*\(data.root: "):
                run_study(study, 1, tmp_path / "out", lambda _: None, lambda: False)
        else:
            run_study(study, 1, tmp_path / "out", lambda _: None, lambda: False)


def test_missing_data_folder_or_set_is_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reproduce()
    listing = capsys.readouterr().out
    assert "On real drawings, with --data FOLDER:" in listing
    assert "  emoji-noisy " in listing
    with pytest.raises(GigabatchError, match="emoji-noisy needs real drawings: add --data FOLDER"):
        reproduce("emoji-noisy")
    incomplete = tmp_path / "incomplete"
    (incomplete / "train").mkdir(parents=True)
    (incomplete / "train" / "a.tar").write_bytes(b"")
    with pytest.raises(GigabatchError, match=f"--data {incomplete}: it has no folder val-artist"):
        reproduce("all", data=incomplete, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_drawings_without_names_or_concepts_are_rejected(drawings: Path, tmp_path: Path) -> None:
    for fields, message in (
        ({"concept": 1, "names": {"en": "x"}}, "train: no sample's json has `names` in all of en"),
        ({"names": {}}, "its json has no field `concept`"),
    ):
        folder = tmp_path / str(len(fields))
        for name in ARTISTS:
            (folder / name).mkdir(parents=True)
            with wds.TarWriter(str(folder / name / "0.tar")) as writer:
                writer.write({"__key__": "k", "png": b"png", "txt": "x", "json": fields})
        study = _study("emoji-languages", folder)
        with pytest.raises(GigabatchError, match=message):
            study.write(tmp_path / "out", np.random.default_rng(0), "")


def test_report_gives_a_paper_the_verdict_of_its_first_study_and_sections_for_all(
    tmp_path: Path,
) -> None:
    every_study = (*STUDIES, *real_data_studies(None))
    for study in every_study:
        if "1-to-K" in study.papers:
            low, high = (0.4, 0.6) if study.intervals else (None, None)
            results = {
                variant.name: {m.name: Estimate((0.5,), low, high) for m in study.metrics}
                for variant in study.variants
            }
            outcome = report.as_json(Outcome(replace(study, checks=()), 1, results, 1.0))
            report.save(tmp_path, study, {**outcome, "passed": not study.intervals})
    report.write_report(tmp_path / "report.md", tmp_path, every_study)
    text = (tmp_path / "report.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| 1-to-K |"))
    assert "[PASS](#one-to-k)" in row
    assert "## one-to-k" in text
    section = text[text.index("## emoji-languages") :]
    assert "**FAIL**: 1 seeds" in section
    (line,) = (line for line in section.splitlines() if line.startswith("artist R@10, zh"))
    assert re.split(" {2,}", line)[1:] == ["0.500 ± 0.000 [0.400, 0.600]"] * 4  # per variant
