"""`gigabatch eval` on a run without images: linear models, what its objective keeps, batch bias,
triggers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import Command, run_ranks, write_modalities
from typer.testing import CliRunner

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cli.app import app

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("evaluations of state")]
Told = Callable[..., dict[str, float]]

CONFIG = """
data:
  root: {root}
  train: [{{path: train, weight: 2}}, {{path: other, weight: 1}}]
  workers: 0
  text: {{vocab_size: 300, length: 10}}
batch: {{global_size: 40, micro_size: 40}}
train: {{steps: 30}}
optimizer: {{lr: 2.0e-2}}
checkpoint: {{every_steps: 0}}
run: {{dir: {root}, name: a}}
cluster: {{launcher: inline, workers: 1, threads: 1}}
towers:
  width: 16
  text: {{width: 16}}
  more:
    numbers: {{kind: vector, size: 6, width: 16, layers: 1}}
    path: {{kind: sequence, size: 2, length: 4, fields: [path], width: 16, heads: 2}}
objective:
  name: sum
  terms:
  - {{name: sogclr, taps: [numbers, path], temperatures: individual, temperature_lr: 1.0e-3,
      positives: concept}}
  - {{name: noisy, taps: [numbers, text]}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("state")
    # Of `train` ten concepts are rarer by one.
    for name, count, seed in (("train", 90, 1), ("val", 40, 2), ("other", 40, 3)):
        write_modalities(home / name, count, seed, images=False)
    (home / "c.yaml").write_text(CONFIG.format(root=home))
    done = Command(["train", home / "c.yaml"]).wait()
    assert done.returncode == 0, done.stderr
    return home / "a"


@pytest.fixture
def told(run: Path) -> Told:
    def measure(*arguments: str) -> dict[str, float]:
        done = CliRunner().invoke(app, ["eval", str(run), *arguments, "--json"])
        if done.exception is not None:
            raise done.exception
        found = json.loads(done.stdout)
        (under,) = {"/".join(name.split("/")[:3]) for name in found}
        return {name.removeprefix(f"{under}/"): value for name, value in found.items()}

    return measure


def concepts(count: int) -> np.ndarray:
    return np.arange(count) % 20


def test_ages_are_regressed_with_slices_and_intervals(told: Told) -> None:
    arguments = ("--on", "val", "--task", "probe", "kind=regression", "label=age")
    found = told(*arguments, "modality=numbers", "--slice", "old", "--intervals")
    assert found["r2"] > 0.3
    assert found["mae"] <= found["rmse"] < (3 * concepts(40)).std()
    parts = [found[f"old={old}/mae"] for old in (False, True)]
    assert found["mae"] == pytest.approx(np.mean(parts))
    assert found["r2/low"] < found["r2"] < found["r2/high"]
    before = told(*arguments, "modality=numbers", "tap=encoder")
    assert before["r2"] > 0.3
    assert told(*arguments) != found  # of text, the first modality that there is


def test_classes_without_images(told: Told) -> None:
    for arguments in (["--task", "knn", "k=3"], ["--task", "probe"]):
        found = told("--on", "val", *arguments, "label=concept", "modality=numbers")
        assert found["top1"] > 0.5
        assert told("--on", "val", *arguments, "label=concept")["top1"] > 0.5  # of text
    shot = told("--on", "val", "--task", "zero-shot", "label=concept", "templates=this is thing {}")
    assert shot["top1"] > 0.3
    shape = told("--on", "val", "--task", "geometry")
    assert {"text_uniformity", "numbers_uniformity", "text_numbers_modality_gap"} < shape.keys()


def test_the_table_tells_what_the_checkpoint_holds(run: Path, told: Told) -> None:
    found = told("--on", "train", "--task", "table", "label=concept", "auc=old", "--slice", "old")
    (folder,) = (run / "checkpoints").glob("step-*")
    state = load_file(folder / "objective.safetensors")
    table = state["table.terms.0.state"][:90].astype(np.float64)
    every = state["table.terms.1.loss"][:, 0].astype(np.float64)
    losses = every[:90]
    assert found["seen"] == found["samples"] == 90
    tau = table[:, 2:4].mean(1)
    assert tau.std() > 0
    for name, values in (("sogclr/temperature", tau), ("noisy/loss", losses)):
        assert found[f"{name}/mean"] == pytest.approx(values.mean())
        assert found[f"{name}/max"] == pytest.approx(values.max())
        assert found[f"{name}/median"] == pytest.approx(np.median(values))
        means = np.array([values[concepts(90) == c].mean() for c in range(20)])
        for concept in range(20):
            assert found[f"concept={concept}/{name}"] == pytest.approx(means[concept])
            assert found[f"concept={concept}/count"] == 4 + (concept < 10)
        wanted = np.corrcoef(means, np.log(4 + (np.arange(20) < 10)))[0, 1]
        assert found[f"{name}/log_frequency_correlation"] == pytest.approx(wanted)
        old = concepts(90) % 2 == 1
        higher = values[old][:, None] - values[~old][None]
        assert found[f"{name}/auc"] == pytest.approx((np.sign(higher).mean() + 1) / 2)
        assert found[f"old=True/{name}/mean"] == pytest.approx(values[old].mean())
    other = told("--on", "other", "--task", "table")
    assert other["seen"] == 40
    assert other["noisy/loss/mean"] == pytest.approx(every[90:].mean())
    assert 0 <= found["noisy/clean_probability/min"] < found["noisy/clean_probability/max"] <= 1


def test_bias_falls_with_the_batch(told: Told) -> None:
    where = ("--on", "train", "--task", "batch-bias", "between=[numbers, path]", "temperature=0.1")
    small = told(*where, "batch=6", "rounds=12")
    large = told(*where, "batch=30", "rounds=12")
    assert (small["samples"], small["batch"], small["temperature"]) == (90, 6, 0.1)
    assert small["relative_error"] > 1.5 * large["relative_error"]
    assert small["cosine"] < large["cosine"]


def test_triggers_by_neighbours(told: Told) -> None:
    where = ("--on", "val", "--slice", "old", "label=concept", "modality=numbers", "k=3")
    plain = told(*where, "--task", "knn")
    found = told(*where, "--task", "trigger", "target=3", "triggered=old", "--intervals")
    assert found["triggered"] == 20
    assert found["clean_top1"] == pytest.approx(plain["old=False/top1"])
    assert found["old=True/attack_success"] == found["attack_success"] < 0.2  # no trigger at all
    assert "old=False/attack_success" not in found
    assert -1 < found["triggered_cosine"] < 0.9


def test_two_ranks_find_the_same(run: Path, told: Told) -> None:
    asked = [
        ["val", "probe", "kind=regression", "label=age", "modality=numbers"],
        ["train", "table", "label=concept", "auc=old"],
        ["train", "batch-bias", "between=[numbers, path]", "temperature=0.1", "batch=30"],
        ["val", "trigger", "label=concept", "target=3", "triggered=old", "k=3"],
    ]
    together = run_ranks(Path(__file__).with_name("measure_probe.py"), 2, run, json.dumps(asked))
    for found, (on, task, *settings) in zip(together, asked, strict=True):
        assert found == pytest.approx(told("--on", on, "--task", task, *settings), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--on", "val", "--task", "table"], "the run was not trained on val, but on train, other"),
        (["--on", "train", "--task", "table", "auc=age"], "'age' .* neither true nor false"),
        (["--on", "val", "--task", "probe", "label=path", "kind=regression"], "is no number"),
        (["--on", "val", "--task", "probe", "label=age", "kind=ridge"], "probe: kind: Input"),
        (["--on", "train", "--task", "batch-bias"], "no temperature of its own"),
        (
            ["--on", "val", "--task", "batch-bias", "batch=21", "temperature=1"],
            "batch of 21 is compared with 40 samples of 40 in val; two batches or more",
        ),
        (
            ["--on", "val", "--task", "trigger", "label=concept", "target=99", "triggered=old"],
            "no training sample has concept = 99",
        ),
    ],
)
def test_what_is_missing_is_named(told: Told, arguments: list[str], words: str) -> None:
    with pytest.raises(GigabatchError, match=words):
        told(*arguments)
