"""Training runs of a sum of all objectives, with all their state."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support import losses, write_samples

from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.monitoring.metrics import read_metrics
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder

ALL_OBJECTIVES = """objective={name: sum, terms: [
    {name: queue, size: 50, momentum: 0.9},
    {name: noisy},
    {name: sogclr, temperatures: individual},
    {name: siglip},
    {name: supcon, positives: concept},
    {name: late_interaction},
    {name: symile, taps: [image, text, image@1]},
    {name: hard_negatives, pair: concept, changed: changed, own_weight: 2.0},
    {name: label_distance, label: concept, mixed_negatives: true, mixed_positives: 2},
    {name: barlow, taps: [image.projection, image.projection@1]},
    {name: byol, momentum: 0.9},
    {name: swav, prototypes: 20},
]}"""
# Ten steps are more than one epoch of 200 samples: `noisy` splits the samples after the first.
SETTINGS = ["train.steps=10", "eval.sets=[]", "checkpoint.every_steps=0", ALL_OBJECTIVES]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sets of `shards` in conftest.py, whose samples also have flags."""
    root = tmp_path_factory.mktemp("flags")
    write_samples(root / "train", 200, 50, seed=1, flags=True)
    write_samples(root / "val", 60, 60, seed=2)
    return root


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
def test_resumed_run_with_objective_state_has_equal_losses(tiny: Path) -> None:
    full, resumed = new_run(tiny, "full"), new_run(tiny, "resumed")
    assert run_training(full)
    for last in (4, 3):  # stop after four steps, then after three more
        calls = count(1)
        assert not run_training(resumed, lambda calls=calls, last=last: next(calls) == last)
    assert run_training(resumed)
    assert losses(resumed.path) == losses(full.path)
    assert sorted(losses(resumed.path)) == list(range(1, 11))
    final = [line for line in read_metrics(full.metrics) if "train/loss" in line][-1]
    assert final["train/queue/queue"] == 50
    assert 0 < final["train/noisy/clean"] < 1, "the samples were not split"
    assert final["train/sogclr/temperature"] != pytest.approx(0.07, abs=1e-6)


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    """Covers sharded tables, gathered queues, and ZeRO 3 shards for the momentum tower."""
    assert run_training(new_run(tiny, "one"))
    done = gigabatch(
        "train", tiny, *SETTINGS, "run.name=two", "train.zero_stage=3", "cluster.launcher=torchrun",
        "cluster.workers=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (losses(tmp_path / "runs" / name) for name in ("one", "two"))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
