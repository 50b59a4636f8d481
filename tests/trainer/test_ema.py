"""`train.ema`: the average of the towers' weights over steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import losses, outcome
from torch import nn

from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.tokenizer import load_tokenizer
from gigabatch.trainer.checkpoints.format import checkpoint_at
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.ema import update_averages, warmup_momentum
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.towers import build_towers

SAVE_EVERY_STEP = ["checkpoint.every_steps=1", "checkpoint.keep=9", "eval.sets=[]"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Tied(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        nn.init.constant_(self.first.weight, value)
        self.second = self.first
        self.register_buffer("count", torch.tensor(int(value)))


def test_tied_weights_are_updated_once_and_integers_copied() -> None:
    average, other, current = Tied(1.0), Tied(2.0), Tied(5.0)
    update_averages(iter(current.state_dict().items()), [(average, 0.75), (other, 0.5)])
    assert average.first.weight.unique().tolist() == [2.0]
    assert other.second.weight.unique().tolist() == [3.5]
    assert average.count == 5


def test_without_averages_no_weights_are_gathered() -> None:
    def weights() -> Iterator[Any]:
        raise AssertionError("gathered")
        yield

    update_averages(weights(), [])


def new_run(tiny: Path, name: str, *settings: str) -> RunFolder:
    config = load_config(tiny, [*settings, f"run.name={name}"])
    run = create_run(config, name)
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    return run


def assert_average(run: RunFolder, momentum: float, steps: int) -> None:
    """Compare each checkpoint's average with one computed from the weights of all steps."""
    vocab_size = load_tokenizer(run.tokenizer).get_vocab_size()
    initial = build_towers(run.config(), vocab_size).state_dict()
    expected = {name: weight.double() for name, weight in initial.items()}
    for step in range(1, steps + 1):
        m = min(momentum, (1 + step) / (10 + step))
        for name, weight in checkpoint_at(run, step).tensors("towers").items():
            expected[name] = m * expected[name] + (1 - m) * weight.double()
        averages = checkpoint_at(run, step).tensors("ema")
        assert averages.keys() == expected.keys()
        for name, average in averages.items():
            torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_ema_averages_the_weights_of_each_step(tiny: Path) -> None:
    assert [warmup_momentum(0.3, step) for step in (1, 2, 99)] == [2 / 11, 0.25, 0.3]
    run = new_run(tiny, "run", *SAVE_EVERY_STEP, "train.ema=0.3", "train.steps=4")
    assert run_training(run)
    assert_average(run, 0.3, 4)


def test_ema_and_momentum_tower_use_separate_momenta(tiny: Path) -> None:
    queue = "objective={name: queue, size: 40, momentum: 0.9}"
    run = new_run(tiny, "run", *SAVE_EVERY_STEP, queue, "train.ema=0.3", "train.steps=2")
    assert run_training(run)
    assert_average(run, 0.3, 2)
    before, after = (checkpoint_at(run, step).tensors("objective") for step in (1, 2))
    for name, weight in checkpoint_at(run, 2).tensors("towers").items():
        expected = before[f"teacher.{name}"].lerp(weight, 1 - 0.9)
        torch.testing.assert_close(after[f"teacher.{name}"], expected)


@pytest.mark.slow
def test_ema_under_zero_3_is_complete(tiny: Path, gigabatch: Any) -> None:
    two = ["cluster.launcher=torchrun", "cluster.workers=2", "train.zero_stage=3", "run.name=run"]
    done = gigabatch("train", tiny, *SAVE_EVERY_STEP, *two, "train.ema=0.3", "train.steps=4")
    assert done.returncode == 0, done.stderr
    assert_average(RunFolder(tiny.parent / "runs" / "run"), 0.3, 4)


@pytest.mark.slow
def test_resumed_run_has_the_same_average(tiny: Path) -> None:
    settings = ("train.ema=0.9", "train.steps=5", "eval.sets=[]")
    full, resumed = (new_run(tiny, name, *settings) for name in ("full", "resumed"))
    assert run_training(full)
    calls = iter(range(100))
    assert not run_training(resumed, lambda: next(calls) == 2)
    assert resumed.steps_saved()[-1] == 3
    assert run_training(resumed)
    assert losses(resumed.path) == losses(full.path)
    expected, actual = (checkpoint_at(run, 5).tensors("ema") for run in (full, resumed))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow
def test_evaluations_use_the_average(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.ema=0.9", "train.steps=6", "optimizer.lr=2.0e-2", "eval.every_steps=3"]
    run = new_run(tiny, "run", *settings)
    assert run_training(run)

    def measured(*more: str) -> dict[str, Any]:
        arguments = ("eval", run.path, "--on", "val", "--json", *more)
        code, out, err = outcome(monkeypatch, capsys, *arguments)
        assert code == 0, err
        return dict(json.loads(out))

    capsys.readouterr()  # Drop the training log.
    while_training = run.evaluation(6)
    averaged, last = measured(), measured("--weights", "last")
    assert averaged == measured("--weights", "ema")
    assert {tag: averaged[tag] for tag in while_training} == pytest.approx(while_training)
    assert {tag: last[tag] for tag in while_training} != while_training
    files = {path.name for path in (run.path / "eval").iterdir()}
    assert {"val-retrieval-step-00000006.json", "val-retrieval-last-step-00000006.json"} <= files
    for weights, file in (("ema", "ema"), (None, "ema"), ("last", "towers")):
        _, towers = load_newest_towers(run, weights=weights)
        stored = checkpoint_at(run, 6).tensors(file)
        assert all(torch.equal(w, stored[name]) for name, w in towers.state_dict().items())


def test_checkpoint_without_an_average_raises(tiny: Path) -> None:
    run = new_run(tiny, "run", "train.steps=3", "eval.sets=[]")
    calls = iter(range(100))
    assert not run_training(run, lambda: next(calls) == 1)
    with pytest.raises(GigabatchError, match="no averaged weights"):
        load_newest_towers(run, weights="ema")
    train = run.config().train.model_copy(update={"ema": 0.5})
    run.write_config(run.config().model_copy(update={"train": train}))
    with pytest.raises(GigabatchError, match="has no averaged weights"):
        run_training(run)
