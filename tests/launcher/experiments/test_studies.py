"""Definitions of all experiments: valid configs, reachable verdicts, reproducible data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gigabatch.launcher.experiments.papers import PAPERS
from gigabatch.launcher.experiments.run import config_of
from gigabatch.launcher.experiments.studies import STUDIES, real_data_studies
from gigabatch.launcher.experiments.study import Check, Estimate, Study
from gigabatch.trainer.evaluation.registry import parse_task

synthetic_study = pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
any_study = pytest.mark.parametrize(
    "study", [*STUDIES, *real_data_studies(None)], ids=lambda study: study.name
)


@any_study
def test_variants_have_valid_configs_and_metrics_valid_tasks(study: Study, tmp_path: Path) -> None:
    names = [variant.name for variant in study.variants]
    assert len(set(names)) == len(names)
    for variant in study.variants:
        config = config_of(study, variant, 1, tmp_path / "data", tmp_path)
        assert config.run.seed == 1
        assert config.cluster.launcher == "inline"
        assert variant.init_from in (None, *names)
    for metric in study.metrics:
        parse_task(metric.task, metric.settings)
        assert set(metric.variants) <= set(names)


@any_study
def test_every_check_can_pass_and_fail(study: Study) -> None:
    values = (-10.0, -1.0, -0.1, 0.1, 1.0, 10.0)
    random = np.random.default_rng(0)
    verdicts: dict[Check, set[bool]] = {check: set() for check in study.checks}
    for _ in range(2000):
        if all(len(outcomes) == 2 for outcomes in verdicts.values()):
            break
        results = {
            variant.name: {
                metric.name: Estimate((float(random.choice(values) * random.random()),))
                for metric in study.metrics
                if metric.applies_to(variant)
            }
            for variant in study.variants
        }
        for check in study.checks:
            verdicts[check].add(check.passes(results))
    assert set(map(frozenset, verdicts.values())) == {frozenset({True, False})}


@pytest.mark.slow
@synthetic_study
def test_same_seed_writes_same_data(study: Study, tmp_path: Path) -> None:
    data_kind = study.variants[0].data_kind
    for copy in ("a", "b"):
        study.write(tmp_path / copy, np.random.default_rng(3), data_kind)
    first, second = (
        {path.relative_to(tmp_path / copy): path.read_bytes()
         for path in sorted((tmp_path / copy).rglob("*.tar"))}
        for copy in ("a", "b")
    )  # fmt: skip
    assert first
    assert first == second
    sets = {path.parts[0] for path in first}
    assert {metric.dataset for metric in study.metrics} <= sets


def test_every_measured_paper_has_a_study() -> None:
    assert [paper.alias for paper in PAPERS] == list(range(1, 56))
    measured = {paper.title for paper in PAPERS if paper.status == "study"}
    assert measured == {title for study in STUDIES for title in study.papers}


def test_check_with_two_thresholds_passes_between_them() -> None:
    check = Check("x", lambda mean: mean("a", "f"), 0.5, 0.7)
    verdicts = [check.passes({"a": {"f": Estimate((v,))}}) for v in (0.4, 0.5, 0.7, 0.8)]
    assert verdicts == [False, True, True, False]


def test_std_is_the_sample_standard_deviation() -> None:
    assert Estimate((1.0, 3.0)).std == pytest.approx(2**0.5)
    assert Estimate((1.0,)).std == 0.0
