"""Retention of checkpoints: the newest, every mth, and the best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from support import TINY

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints.retention import best_step, save_is_due, steps_to_keep
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder

METRIC = "eval/val/mean_recall@10"


def evaluated_run(path: Path, values: dict[int, float]) -> RunFolder:
    run = RunFolder(path)
    for step, value in values.items():
        run.write_evaluation(step, {METRIC: value})
    return run


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"keep": 2}, {5, 6}),
        ({"keep": 99}, {1, 2, 3, 4, 5, 6}),
        ({"keep": 1, "keep_every": 2}, {2, 4, 6}),
        ({"keep": 1, "best": METRIC}, {3, 6}),
        ({"keep": 1, "keep_every": 5, "best": METRIC}, {3, 5, 6}),
    ],
)
def test_newest_every_mth_and_best_checkpoints_are_kept(
    settings: dict[str, object], steps: set[int], tmp_path: Path
) -> None:
    run = evaluated_run(tmp_path, {1: 0.1, 3: 0.5, 4: 0.5, 5: math.nan})
    chosen = CheckpointSettings.model_validate(settings)
    assert steps_to_keep(run, range(1, 7), chosen) == steps


def test_best_step_without_finite_values_is_none(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path, {1: 0.1, 2: math.nan})
    assert best_step(run, [2, 3], METRIC) is None
    assert best_step(run, [1, 2], "eval/val/other") is None


def test_save_is_due_at_every_step_that_must_be_kept() -> None:
    settings = CheckpointSettings(every_steps=10, keep_every=4, best=METRIC)
    due = [step for step in range(1, 13) if save_is_due(step, settings, evaluated=step == 3)]
    assert due == [3, 4, 8, 10, 12]
    assert not save_is_due(3, CheckpointSettings(), evaluated=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.best=eval/other/mean_recall@10", "eval.every_steps=2"], "never measured"),
        (["checkpoint.best=eval/val/mean_recall@10"], "set eval.every_steps"),
        (["checkpoint.best=eval/val/i2t_median_rank", "eval.every_steps=2"], "better when lower"),
        (["checkpoint.best=train/loss"], "pattern"),
    ],
)
def test_best_metric_that_is_never_measured_raises(overrides: list[str], message: str) -> None:
    with pytest.raises(GigabatchError, match=message):
        parse_config(TINY.format(root="/data"), "tiny", overrides)


def train(shards: Path, folder: Path, *overrides: str) -> RunFolder:
    settings = [f"run.dir={folder}", "run.name=a", "data.workers=0", "checkpoint.every_steps=0"]
    config = parse_config(TINY.format(root=shards), "tiny", [*settings, *overrides])
    run = create_run(config, "run")
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    run_training(run)
    return run


@pytest.mark.slow
def test_run_keeps_its_best_and_every_mth_checkpoint(shards: Path, tmp_path: Path) -> None:
    run = train(
        shards, tmp_path, "train.steps=10", "eval.every_steps=2", f"checkpoint.best={METRIC}",
        "checkpoint.keep=1", "checkpoint.keep_every=5", "optimizer.lr=3.0e-2",
        "schedule.warmup_steps=0",
    )  # fmt: skip
    values = {step: run.evaluation(step)[METRIC] for step in (2, 4, 6, 8)}
    best = max(values, key=values.__getitem__)
    assert run.steps_saved() == sorted({best, 5, 10})


def test_misspelled_best_metric_raises_with_its_name(shards: Path, tmp_path: Path) -> None:
    overrides = ["train.steps=4", "eval.every_steps=1", "checkpoint.best=eval/val/mean_recal@10"]
    with pytest.raises(
        GigabatchError, match=r"no metric eval/val/mean_recal@10. Set it to one of .*@10"
    ):
        train(shards, tmp_path, *overrides)
