"""Every experiment's description: what it sets and asks is known, and its data are sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gigabatch.launcher.experiments.papers import PAPERS
from gigabatch.launcher.experiments.run import config_of
from gigabatch.launcher.experiments.studies import STUDIES, studies_on
from gigabatch.launcher.experiments.study import Bar, Figure, Study
from gigabatch.trainer.evaluation.registry import parse_task

study_of = pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
any_study = pytest.mark.parametrize(
    "study", [*STUDIES, *studies_on(None)], ids=lambda study: study.name
)


@any_study
def test_each_way_is_a_config_and_each_figure_a_task(study: Study, tmp_path: Path) -> None:
    names = [arm.name for arm in study.arms]
    assert len(set(names)) == len(names)
    for arm in study.arms:
        config = config_of(study, arm, 1, tmp_path / "data", tmp_path)
        assert config.run.seed == 1
        assert config.cluster.launcher == "inline"
        assert arm.begins_with in (None, *names)
    for measure in study.measures:
        parse_task(measure.task, measure.settings)
        assert set(measure.arms) <= set(names)


@any_study
def test_each_bar_can_be_missed(study: Study) -> None:
    values = (-10.0, -1.0, -0.1, 0.1, 1.0, 10.0)
    random = np.random.default_rng(0)
    outcomes: dict[str, set[bool]] = {bar.what + bar.bound: set() for bar in study.bars}
    for _ in range(2000):
        if all(len(seen) == 2 for seen in outcomes.values()):
            break
        figures = {
            arm.name: {
                m.figure: Figure((float(random.choice(values) * random.random()),))
                for m in study.measures
                if m.is_of(arm)
            }
            for arm in study.arms
        }
        for bar in study.bars:
            outcomes[bar.what + bar.bound].add(bar.holds(figures))
    assert set(map(frozenset, outcomes.values())) == {frozenset({True, False})}


@pytest.mark.slow
@study_of
def test_the_same_start_draws_the_same_data(study: Study, tmp_path: Path) -> None:
    arm = study.arms[0]
    for copy in ("a", "b"):
        study.write(tmp_path / copy, np.random.default_rng(3), arm.data)
    first, second = (
        {path.relative_to(tmp_path / copy): path.read_bytes()
         for path in sorted((tmp_path / copy).rglob("*.tar"))}
        for copy in ("a", "b")
    )  # fmt: skip
    assert first
    assert first == second
    sets = {path.parts[0] for path in first}
    assert {measure.on for measure in study.measures} <= sets


def test_every_paper_has_a_standing_and_every_study_its_papers() -> None:
    assert [paper.number for paper in PAPERS] == list(range(1, 56))
    measured = {paper.number for paper in PAPERS if paper.standing == "study"}
    assert measured == {number for study in STUDIES for number in study.papers}


def test_a_bar_between_two_bounds() -> None:
    bar = Bar("x", lambda mean: mean("a", "f"), 0.5, 0.7)
    assert [bar.holds({"a": {"f": Figure((v,))}}) for v in (0.4, 0.5, 0.7, 0.8)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert bar.bound == ">= 0.5 and <= 0.7"
    assert Figure((1.0, 3.0)).spread == pytest.approx(2**0.5)
