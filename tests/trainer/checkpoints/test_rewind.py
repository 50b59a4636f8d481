"""Rewinds: after consecutive non-finite steps, training resumes from the last checkpoint."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import support_towers
import torch
from support import losses

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints.format import checkpoint_at
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.monitoring.metrics import read_metrics
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder


def new_run(tiny: Path, tower: str, *overrides: str) -> RunFolder:
    config = load_config(
        tiny,
        [
            f"towers.image={{kind: module, module: 'support_towers:{tower}'}}", "eval.sets=[]",
            "checkpoint.keep=9", "train.max_bad_steps=3", "train.on_bad_steps=rewind", *overrides,
        ],
    )  # fmt: skip
    run = create_run(config, "run")
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    return run


@pytest.mark.slow
def test_save_requested_during_bad_steps_is_saved_after_them(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tiny, "NanForTwelveBatches", "train.max_bad_steps=9", "checkpoint.every_steps=0")
    monkeypatch.setattr(support_towers.NanForTwelveBatches, "calls", 0)
    steps = []

    def stop() -> bool:  # called once per step
        steps.append(None)
        if len(steps) == 6:  # the first bad step
            run.request_save()
        return False

    assert run_training(run, stop)
    assert run.steps_saved() == [9, 12]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_rewind_restores_the_checkpoint_and_skips_the_bad_steps(
    zero: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tiny, "NanForTwelveBatches", f"train.zero_stage={zero}")
    monkeypatch.setattr(support_towers.NanForTwelveBatches, "calls", 0)
    assert run_training(run)
    # A step calls the tower 8 times, a bad step 4 times, so steps 6, 7 and 8 are bad.
    assert run.steps_saved() == [3, 8, 9, 12]
    before, after = checkpoint_at(run, 3), checkpoint_at(run, 8)
    for name in ("towers", "moments", "objective"):
        old, new = before.tensors(name), after.tensors(name)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old), name
    assert after.state["optimizer_steps"] == 3
    assert (after.state["rewinds"], after.state["skipped"], after.state["bad_steps"]) == (1, 3, 0)
    lines = [line for line in read_metrics(run.metrics) if "train/rewinds" in line]
    assert [(line["step"], line["train/voided_steps"]) for line in lines] == [(8, 5)]
    expected = losses(run.path)
    assert sorted(expected) == list(range(1, 13))
    # A resume from the checkpoint after the rewind takes the same steps.
    for step in (9, 12):
        shutil.rmtree(run.checkpoints / f"step-{step:08d}")
    monkeypatch.setattr(support_towers.NanForTwelveBatches, "calls", 60)
    assert run_training(run)
    assert losses(run.path) == expected


def test_rewind_without_a_checkpoint_restores_the_initial_state(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tiny, "NanForTwelveBatches", "checkpoint.every_steps=0", "train.steps=8")
    monkeypatch.setattr(support_towers.NanForTwelveBatches, "calls", 0)
    towers = []
    init = support_towers.NanForTwelveBatches.__init__

    def init_and_record(self: support_towers.NanForTwelveBatches, width: int = 4) -> None:
        init(self, width)
        towers.append(weakref.ref(self))

    monkeypatch.setattr(support_towers.NanForTwelveBatches, "__init__", init_and_record)
    assert run_training(run)
    assert run.steps_saved() == [8]
    assert checkpoint_at(run, 8).state["optimizer_steps"] == 0
    gc.collect()
    assert len(towers) == 2
    assert towers[0]() is None, "the towers before the rewind are still in memory"


def test_run_stops_after_max_rewinds(tiny: Path) -> None:
    run = new_run(tiny, "Broken", "train.max_rewinds=2", "train.steps=30")
    with pytest.raises(GigabatchError, match=r"3 consecutive steps .* after 2 rewinds"):
        run_training(run)
    assert max(losses(run.path)) == 9
