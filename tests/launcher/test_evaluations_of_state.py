"""`gigabatch eval` on a run without images: linear models, sample state, batch bias, triggers."""

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
Measure = Callable[..., dict[str, float]]

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
    # 90 samples of 20 concepts: ten concepts of `train` have five samples, ten have four.
    for name, count, seed in (("train", 90, 1), ("val", 40, 2), ("other", 40, 3)):
        write_modalities(home / name, count, seed, images=False)
    (home / "c.yaml").write_text(CONFIG.format(root=home))
    done = Command(["train", home / "c.yaml"]).wait()
    assert done.returncode == 0, done.stderr
    return home / "a"


@pytest.fixture
def measure(run: Path) -> Measure:
    """Run `gigabatch eval` in this process; return the metrics without `eval/SET/TASK/`."""

    def invoke(*arguments: str) -> dict[str, float]:
        done = CliRunner().invoke(app, ["eval", str(run), *arguments, "--json"])
        if done.exception is not None:
            raise done.exception
        metrics = json.loads(done.stdout)
        (prefix,) = {"/".join(name.split("/")[:3]) for name in metrics}
        return {name.removeprefix(f"{prefix}/"): value for name, value in metrics.items()}

    return invoke


def concepts(count: int) -> np.ndarray:
    return np.arange(count) % 20


def test_regression_probe_reports_slices_and_intervals(measure: Measure) -> None:
    arguments = ("--on", "val", "--task", "probe", "kind=regression", "label=age")
    metrics = measure(*arguments, "modality=numbers", "--slice", "old", "--intervals")
    assert metrics["r2"] > 0.3
    assert metrics["mae"] <= metrics["rmse"] < (3 * concepts(40)).std()
    parts = [metrics[f"old={old}/mae"] for old in (False, True)]
    assert metrics["mae"] == pytest.approx(np.mean(parts))
    assert metrics["r2/low"] < metrics["r2"] < metrics["r2/high"]
    encoder = measure(*arguments, "modality=numbers", "tap=encoder")
    assert encoder["r2"] > 0.3
    assert measure(*arguments) != metrics  # the default is text, the run's first modality


def test_classification_works_without_images(measure: Measure) -> None:
    for task in (["--task", "knn", "k=3"], ["--task", "probe"]):
        arguments = ["--on", "val", *task, "label=concept"]
        assert measure(*arguments, "modality=numbers")["top1"] > 0.5
        assert measure(*arguments)["top1"] > 0.5  # text, the first modality
    zero_shot = ["--task", "zero-shot", "label=concept", "templates=this is thing {}"]
    assert measure("--on", "val", *zero_shot)["top1"] > 0.3
    geometry = measure("--on", "val", "--task", "geometry")
    names = {"text_uniformity", "numbers_uniformity", "text_numbers_modality_gap"}
    assert names < geometry.keys()


def test_sample_state_matches_the_checkpoint(run: Path, measure: Measure) -> None:
    settings = ("label=concept", "auc=old", "--slice", "old")
    metrics = measure("--on", "train", "--task", "sample-state", *settings)
    (folder,) = (run / "checkpoints").glob("step-*")
    state = load_file(folder / "objective.safetensors")
    table = state["table.terms.0.state"][:90].astype(np.float64)
    all_losses = state["table.terms.1.loss"][:, 0].astype(np.float64)
    losses = all_losses[:90]
    assert metrics["seen"] == metrics["samples"] == 90
    tau = table[:, 2:4].mean(1)
    assert tau.std() > 0
    for name, values in (("sogclr/temperature", tau), ("noisy/loss", losses)):
        assert metrics[f"{name}/mean"] == pytest.approx(values.mean())
        assert metrics[f"{name}/max"] == pytest.approx(values.max())
        assert metrics[f"{name}/median"] == pytest.approx(np.median(values))
        means = np.array([values[concepts(90) == c].mean() for c in range(20)])
        counts = 4 + (np.arange(20) < 10)
        for concept in range(20):
            assert metrics[f"concept={concept}/{name}"] == pytest.approx(means[concept])
            assert metrics[f"concept={concept}/count"] == counts[concept]
        correlation = np.corrcoef(means, np.log(counts))[0, 1]
        assert metrics[f"{name}/log_frequency_correlation"] == pytest.approx(correlation)
        old = concepts(90) % 2 == 1
        higher = values[old][:, None] - values[~old][None]
        assert metrics[f"{name}/auc"] == pytest.approx((np.sign(higher).mean() + 1) / 2)
        assert metrics[f"old=True/{name}/mean"] == pytest.approx(values[old].mean())
    assert 0 <= metrics["noisy/clean_probability/min"] < metrics["noisy/clean_probability/max"] <= 1
    other = measure("--on", "other", "--task", "sample-state")
    assert other["seen"] == 40
    assert other["noisy/loss/mean"] == pytest.approx(all_losses[90:].mean())


def test_table_is_an_alias_with_the_same_tags_and_file(run: Path) -> None:
    outputs = []
    for task in ("sample-state", "table"):
        arguments = ["eval", str(run), "--on", "other", "--task", task, "--json"]
        outputs.append(CliRunner().invoke(app, arguments).stdout)
        assert "eval/other/table/seen" in json.loads(outputs[-1])
        (path,) = (run / "eval").glob("other-*.json")
        assert path.name == "other-table-step-00000030.json"
        path.unlink()
    assert outputs[0] == outputs[1]


def test_larger_batch_has_less_bias(measure: Measure) -> None:
    settings = ("between=[numbers, path]", "temperature=0.1", "rounds=12")
    small = measure("--on", "train", "--task", "batch-bias", *settings, "batch=6")
    large = measure("--on", "train", "--task", "batch-bias", *settings, "batch=30")
    assert (small["samples"], small["batch"], small["temperature"]) == (90, 6, 0.1)
    assert small["relative_error"] > 1.5 * large["relative_error"]
    assert small["cosine"] < large["cosine"]


def test_trigger_without_an_attack_has_low_success(measure: Measure) -> None:
    arguments = ("--on", "val", "--slice", "old", "label=concept", "modality=numbers", "k=3")
    knn = measure(*arguments, "--task", "knn")
    settings = ("--task", "trigger", "target=3", "triggered=old", "--intervals")
    metrics = measure(*arguments, *settings)
    assert metrics["triggered"] == 20
    assert metrics["clean_top1"] == pytest.approx(knn["old=False/top1"])
    assert metrics["old=True/attack_success"] == metrics["attack_success"] < 0.2
    assert "old=False/attack_success" not in metrics
    assert -1 < metrics["triggered_cosine"] < 0.9


def test_two_ranks_report_the_metrics_of_one(run: Path, measure: Measure) -> None:
    requests = [
        ["val", "probe", "kind=regression", "label=age", "modality=numbers"],
        ["train", "sample-state", "label=concept", "auc=old"],
        ["train", "batch-bias", "between=[numbers, path]", "temperature=0.1", "batch=30"],
        ["val", "trigger", "label=concept", "target=3", "triggered=old", "k=3"],
    ]
    script = Path(__file__).with_name("tasks_probe.py")
    two_ranks = run_ranks(script, 2, run, json.dumps(requests))
    for metrics, (on, task, *settings) in zip(two_ranks, requests, strict=True):
        one_rank = measure("--on", on, "--task", task, *settings)
        assert metrics == pytest.approx(one_rank, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--on", "val", "--task", "sample-state"],
            "the run was not trained on val but on train, other",
        ),
        (["--on", "train", "--task", "table", "auc=age"], "'age' is .*, not true, false, 1 or 0"),
        (["--on", "val", "--task", "probe", "label=path", "kind=regression"], "not a finite numb"),
        (["--on", "val", "--task", "probe", "label=age", "kind=ridge"], "probe: kind: Input"),
        (["--on", "train", "--task", "batch-bias"], "not have exactly one temperature"),
        (
            ["--on", "val", "--task", "batch-bias", "batch=21", "temperature=1"],
            "batch=21 needs at least 42 samples, two batches; there are 40",
        ),
        (
            ["--on", "val", "--task", "trigger", "label=concept", "target=99", "triggered=old"],
            "no training sample has concept = 99",
        ),
    ],
)
def test_invalid_settings_raise(measure: Measure, arguments: list[str], message: str) -> None:
    with pytest.raises(GigabatchError, match=message):
        measure(*arguments)
