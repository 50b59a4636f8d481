"""`train.epochs`: conversion to steps when a run is created."""

from __future__ import annotations

from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.start import prepare_run, resumed_config
from gigabatch.trainer.config.load import load_config, parse_config
from gigabatch.trainer.run.create import create_run, resolve_epochs


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps"),
    [
        ("1", 1000, 100, 10),
        ("1", 1001, 100, 11),  # rounded up, so every sample is read
        ("0.5", 1000, 100, 5),
        ("2.5", 1000, 100, 25),
        ("0.07", 100, 1, 7),  # not 8, although 0.07 * 100 > 7 in floating point
        ("0.001", 100, 64, 1),
    ],
)
def test_epochs_become_steps_rounded_up(epochs: str, samples: int, batch: int, steps: int) -> None:
    sizes = [f"batch.global_size={batch}", f"batch.micro_size={batch}"]
    config = parse_config("", "c", [f"train.epochs={epochs}", *sizes])
    train = resolve_epochs(config, samples).train
    assert (train.steps, train.epochs) == (steps, None)


def test_config_with_steps_is_unchanged() -> None:
    config = parse_config("", "c", ["train.steps=7"])
    assert resolve_epochs(config, 100) == config


def test_new_run_stores_the_steps(tiny: Path) -> None:
    # 200 and 60 samples, batches of 32: 1.5 epochs are 12.2 steps.
    sources = "data.train=[train, val]"
    config = load_config(tiny, ["train.epochs=1.5", sources, "run.name=a", "eval.sets=[]"])
    run = prepare_run(config, "c")
    stored = run.config()
    assert (stored.train.steps, stored.train.epochs) == (13, None)
    assert resumed_config(run, [], []).train.steps == 13


def test_epochs_on_resume_are_rejected(tiny: Path) -> None:
    run = create_run(load_config(tiny, ["run.name=a"]), "c")
    with pytest.raises(GigabatchError, match=r"set train\.steps=N --allow train\.steps"):
        resumed_config(run, ["train.epochs=2"], ["train.epochs"])


def test_run_without_resolved_steps_is_not_created(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resolve_epochs"):
        create_run(load_config(tiny, ["train.epochs=2"]), "c")
    assert not (tmp_path / "runs").exists()
