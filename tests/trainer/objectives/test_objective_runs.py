"""The objectives in the real trainer: one run of a sum of them, with all that they keep."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support import losses

from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.monitoring.metrics import read_metrics
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder

EVERYTHING = """objective={name: sum, terms: [
    {name: queue, size: 50, momentum: 0.9},
    {name: noisy},
    {name: sogclr, temperatures: individual},
    {name: siglip},
    {name: supcon, positives: concept},
    {name: late_interaction},
    {name: symile, taps: [image, text, image@1]},
    {name: hard_negatives, pair: concept, changed: concept, own_weight: 2.0},
    {name: label_distance, label: concept, mixed_negatives: true, mixed_positives: 2},
    {name: barlow, taps: [image.projection, image.projection@1]},
    {name: byol, momentum: 0.9},
    {name: swav, prototypes: 20},
]}"""
# Two epochs of 200 samples: the split of the noisy ones is made before the step after the first.
SETTINGS = ["train.steps=10", "eval.sets=[]", "checkpoint.every_steps=0", EVERYTHING]


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def new_run(tiny: Path, name: str, settings: Sequence[str] = SETTINGS) -> RunFolder:
    config = load_config(tiny, [*settings, f"run.name={name}"])
    run = create_run(config, name)
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    return run


@pytest.mark.slow
def test_a_run_with_all_that_objectives_keep_goes_on_to_the_bit(tiny: Path) -> None:
    whole, cut = new_run(tiny, "whole"), new_run(tiny, "cut")
    assert run_training(whole)
    for last in (4, 3):  # stopped after four steps, and after three more
        asked = count(1)
        assert not run_training(cut, lambda asked=asked, last=last: next(asked) == last)
    assert run_training(cut)
    assert losses(cut.path) == losses(whole.path)
    assert sorted(losses(cut.path)) == list(range(1, 11))
    final = [line for line in read_metrics(whole.metrics) if "train/loss" in line][-1]
    assert final["train/queue/queue"] == 50
    assert 0 < final["train/noisy/clean"] < 1, "no split was made"
    assert final["train/sogclr/temperature"] != pytest.approx(0.07, abs=1e-6)


@pytest.mark.slow
def test_two_ranks_see_the_same_run(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    """Tables dealt out, queues gathered, ZeRO's shards brought together for the momentum tower."""
    assert run_training(new_run(tiny, "one"))
    done = gigabatch(
        "train", tiny, *SETTINGS, "run.name=two", "train.zero_stage=3", "cluster.launcher=torchrun",
        "cluster.workers=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (losses(tmp_path / "runs" / name) for name in ("one", "two"))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
