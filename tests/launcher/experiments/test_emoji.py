"""The experiments on real drawings, here of a few made-up ones in the same layout."""

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
from gigabatch.launcher.experiments.studies import STUDIES, emoji_languages, studies_on
from gigabatch.launcher.experiments.studies.emoji_noisy import exchanged
from gigabatch.launcher.experiments.study import Figure, Study

ARTISTS = {"train": ("a", "b", "c"), "val-artist": ("d",), "val-concept": ("a", "b", "c", "d")}
CONCEPTS = {"train": range(12), "val-artist": range(12), "val-concept": range(12, 16)}
NAMELESS = "c_5"


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve concepts by three artists and by a fourth, and four others by all; one drawing lacks
    its Chinese name."""
    source = tmp_path_factory.mktemp("drawn")
    for name in ARTISTS:
        _write_set(source / name, ARTISTS[name], CONCEPTS[name])
    return source


def _write_set(folder: Path, artists: tuple[str, ...], concepts: range) -> None:
    folder.mkdir()
    with wds.TarWriter(str(folder / f"{folder.name}-0.tar"), mtime=0) as writer:
        for concept in concepts:
            for artist in artists:
                names = {each: f"{each}{concept} thing" for each in emoji_languages.LANGUAGES}
                names |= {"sw": "left out"}
                if f"{artist}_{concept}" == NAMELESS:
                    del names["zh"]
                pixels = np.full((8, 8, 3), (16 * concept, ord(artist), 255 - 9 * concept))
                png = BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(png, "png")
                about = {"concept": concept, "names": names, "artist": artist}
                writer.write(
                    {"__key__": f"{artist}_{concept}", "png": png.getvalue(), "json": about,
                     "txt": f"en{concept} thing"}
                )  # fmt: skip


def _study(name: str, source: Path | None) -> Study:
    (study,) = (each for each in studies_on(source) if each.name == name)
    return study


def _read(folder: Path) -> list[dict[str, Any]]:
    shards = sorted(map(str, folder.glob("*.tar")))
    return list(wds.WebDataset(shards, shardshuffle=False))


def test_names_are_of_eight_languages_and_all_ways_have_one_vocabulary(
    drawn: Path, tmp_path: Path
) -> None:
    study = _study("emoji-languages", drawn)
    for start in (0, 1):
        study.write(tmp_path / str(start), np.random.default_rng(start), "")
    counts = {name: len(_read(tmp_path / "0" / name)) for name in ARTISTS}
    assert counts == {"train": 35, "val-artist": 12, "val-concept": 16}  # one has no Chinese name
    theirs = [each for each in _read(drawn / "train") if not each["__key__"].endswith(NAMELESS)]
    for ours, their in zip(_read(tmp_path / "0" / "train"), theirs, strict=True):
        about, before = json.loads(ours["json"]), json.loads(their["json"])
        assert ours["png"] == their["png"]
        assert about["concept"] == before["concept"]
        assert about["captions"] == [before["names"][each] for each in emoji_languages.LANGUAGES]
        assert about["names"] == {each: before["names"][each] for each in about["names"]}
        assert about["captions"][0] == their["txt"].decode()
    kept = [tmp_path / str(start) / "vocabulary" / "tokenizer.json" for start in (0, 1)]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_captions_are_exchanged_among_other_concepts(drawn: Path, tmp_path: Path) -> None:
    study = _study("emoji-noisy", drawn)
    for copy, start in (("a", 0), ("b", 0), ("c", 1)):
        study.write(tmp_path / copy, np.random.default_rng(start), "")
    first, again, other = (
        [(each["txt"], each["json"]) for each in _read(tmp_path / copy / "train")]
        for copy in ("a", "b", "c")
    )
    assert first == again != other
    for name in ARTISTS:
        ours, theirs = _read(tmp_path / "a" / name), _read(drawn / name)
        assert [each["png"] for each in ours] == [each["png"] for each in theirs]
        assert Counter(each["txt"] for each in ours) == Counter(each["txt"] for each in theirs)
        about = [json.loads(each["json"]) for each in ours]
        names = [f"en{each['concept']} thing" for each in about]
        right = [each["txt"].decode() == name for each, name in zip(ours, names, strict=True)]
        assert [each["clean"] for each in about] == right
        assert right.count(False) == (int(0.4 * len(ours)) if name == "train" else 0)


def test_no_caption_stays_in_its_concept_however_unequal_concepts_are() -> None:
    random = np.random.default_rng(0)
    concepts = [0] * 30 + [1] * 10 + list(range(2, 70))
    for _ in range(50):
        wrong, instead = exchanged(concepts, random, Path("set"))
        assert sorted(wrong) == sorted(instead)
        assert all(concepts[a] != concepts[b] for a, b in zip(wrong, instead, strict=True))
    with pytest.raises(GigabatchError, match="set: its 9 samples are of too few concepts for 40%"):
        exchanged([1] * 8 + [2], random, Path("set"))


def _short(study: Study, **config: Any) -> Study:
    arms = tuple(
        replace(arm, config={**arm.config, **({"train.steps": 3} if "train.steps" in arm.config
                                              else {})})
        for arm in study.arms
    )  # fmt: skip
    tower = {"towers.image.widths": [8, 8], "towers.image.depths": [1, 1], "data.image.size": 8}
    small = {"train.steps": 2, "batch": {"global_size": 8, "micro_size": 8}, **tower, **config}
    return replace(study, config={**study.config, **small}, arms=arms)


@pytest.mark.slow
def test_both_are_trained_measured_and_told_with_intervals(drawn: Path, tmp_path: Path) -> None:
    study = _short(_study("emoji-languages", drawn))
    found = run_study(study, 1, tmp_path, lambda _: None, lambda: False)
    figure = found.figures["one-to-k"]["concept R@10"]
    assert figure.low is not None
    assert figure.high is not None
    assert 0 < figure.low <= figure.mean <= figure.high
    each = [found.figures["random"][f"artist R@10, {lang}"].mean
            for lang in emoji_languages.LANGUAGES]  # fmt: skip
    assert found.figures["random"]["artist R@10"].mean == pytest.approx(np.mean(each))
    vocabularies = {path.read_bytes() for path in tmp_path.glob("runs/*/tokenizer.json")}
    assert len(vocabularies) == 1
    assert "Ġja" in json.loads(vocabularies.pop())["model"]["vocab"]

    noisy = _short(
        _study("emoji-noisy", drawn), **{"train.steps": 10, "eval.every_steps": 5},
        **{"data.text.vocab_size": 300},
    )  # fmt: skip
    arms = (noisy.arms[0], replace(noisy.arms[1], config={"objective": {"name": "noisy"}}))
    found = run_study(replace(noisy, arms=arms), 1, tmp_path, lambda _: None, lambda: False)
    plain, robust = found.figures["plain"], found.figures["robust"]
    assert plain["artist R@10, best"].mean >= plain["artist R@10, last"].mean
    assert plain["artist R@10, best"].low is None  # of figures of steps that are gone
    assert 0 <= robust["AUC of the split"].mean <= 1
    lines = report.table(report.as_json(found))
    assert "[" in next(line for line in lines if line.startswith("robust"))


@pytest.mark.slow
def test_other_drawings_are_another_experiment(drawn: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ARTISTS:
        _write_set(other / name, ARTISTS[name], range(14))
    for source, refused in ((drawn, False), (other, True)):
        study = _short(_study("emoji-noisy", source), **{"data.text.vocab_size": 300})
        study = replace(study, arms=study.arms[:1], measures=study.measures[1:2], bars=())
        if refused:
            with pytest.raises(GigabatchError, match=r"another version .*\(data.root: "):
                run_study(study, 1, tmp_path / "out", lambda _: None, lambda: False)
        else:
            run_study(study, 1, tmp_path / "out", lambda _: None, lambda: False)


def test_what_is_wrong_with_the_data_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reproduce()
    listed = capsys.readouterr().out
    assert "On real drawings, with --data FOLDER:" in listed
    assert "     1  emoji-noisy" in listed
    with pytest.raises(GigabatchError, match="say where they are, --data FOLDER"):
        reproduce("emoji-noisy")
    lacking = tmp_path / "lacking"
    (lacking / "train").mkdir(parents=True)
    (lacking / "train" / "a.tar").write_bytes(b"")
    with pytest.raises(GigabatchError, match=f"--data {lacking}: there is no val-artist with"):
        reproduce("all", given=lacking, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_drawings_without_names_or_concepts_are_refused(drawn: Path, tmp_path: Path) -> None:
    for about, words in (
        ({"concept": 1, "names": {"en": "x"}}, "train: no sample's json has `names` in all of en"),
        ({"names": {}}, "its json has no `concept`"),
    ):
        folder = tmp_path / str(len(about))
        for name in ARTISTS:
            (folder / name).mkdir(parents=True)
            with wds.TarWriter(str(folder / name / "0.tar")) as writer:
                writer.write({"__key__": "k", "png": b"png", "txt": "x", "json": about})
        study = _study("emoji-languages", folder)
        with pytest.raises(GigabatchError, match=words):
            study.write(tmp_path / "out", np.random.default_rng(0), "")


def test_a_paper_has_the_verdict_of_its_first_experiment_and_sections_of_both(
    tmp_path: Path,
) -> None:
    every = (*STUDIES, *studies_on(None))
    for study in every:
        if 45 in study.papers:
            low, high = (0.4, 0.6) if study.intervals else (None, None)
            figures = {
                arm.name: {m.figure: Figure((0.5,), low, high) for m in study.measures}
                for arm in study.arms
            }
            found = report.as_json(Outcome(replace(study, bars=()), 1, figures, 1.0))
            report.keep(tmp_path, study, {**found, "holds": not study.intervals})
    report.write_report(tmp_path / "found.md", tmp_path, every)
    text = (tmp_path / "found.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| 45 |"))
    assert "[holds](#one-to-k)" in row
    assert "## one-to-k" in text
    section = text[text.index("## emoji-languages") :]
    (line,) = (line for line in section.splitlines() if line.startswith("artist R@10, zh"))
    assert re.split(" {2,}", line)[1:] == ["0.500 ± 0.000 [0.400, 0.600]"] * 4  # an arm a column
