"""Execution of a study: per seed, its data, one run per variant, and their evaluations.

All results are in ordinary folders and are reused. After Ctrl-C or a kill, the same command
continues; an unfinished run resumes from its last checkpoint.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.scan import IndexSettings
from gigabatch.launcher.experiments.study import (
    DATA,
    Estimate,
    Metric,
    Results,
    Study,
    Variant,
)
from gigabatch.launcher.start import prepare_run, reopen_run
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import differences, parse_config, resolve
from gigabatch.trainer.distributed import single_process
from gigabatch.trainer.evaluation.command import open_context, result_name
from gigabatch.trainer.evaluation.registry import parse_task
from gigabatch.trainer.evaluation.tags import metric_tags
from gigabatch.trainer.evaluation.task import SetTask
from gigabatch.trainer.evaluation.tasks.history import best_and_last
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.folder import RunFolder

Say = Callable[[str], None]
Stop = Callable[[], bool]
Interval = tuple[float, float | None, float | None]
"""A metric of one run: its value, and the ends of its 95 % interval, or None without one."""

BASE = {
    "cluster": {"launcher": "inline", "workers": 1, "threads": 1},
    "checkpoint": {"every_minutes": 5, "keep": 1},
    "data": {"train": "train", "workers": 0},
    "monitor": {"every_steps": 50},
    "schedule": {"warmup_steps": 20},
    "eval": {"sets": []},
}


class Stopped(Exception):
    """The user requested a stop; the run in progress has saved a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    study: Study
    seeds: int
    results: Results
    seconds: float

    @property
    def passed(self) -> bool:
        return all(check.passes(self.results) for check in self.study.checks)


def run_study(study: Study, seeds: int, out: Path, say: Say, stop: Stop) -> Outcome:
    """Train and measure every variant with seeds 0 to `seeds` - 1.

    Args:
        study: The experiment.
        seeds: Number of seeds.
        out: Folder for data and runs.
        say: Receives one line per finished run.
        stop: Called during training; True ends it after a checkpoint.

    Raises:
        GigabatchError: if data or a stored run does not fit the study.
        Stopped: if `stop` returned True.
    """
    start_time = time.monotonic()
    values: dict[str, dict[str, list[Interval]]] = {v.name: {} for v in study.variants}
    for seed in range(seeds):
        for variant in study.variants:
            data = _prepare_data(study, variant, seed, out)
            run = _train(study, variant, seed, data, out, say, stop)
            for metric in study.metrics:
                if metric.applies_to(variant):
                    value = _read_metric(run, metric, data / metric.dataset, study.intervals)
                    values[variant.name].setdefault(metric.name, []).append(value)
            if stop():
                raise Stopped
    results = {
        variant: {name: _estimate(over_seeds) for name, over_seeds in metrics.items()}
        for variant, metrics in values.items()
    }
    return Outcome(study, seeds, results, time.monotonic() - start_time)


def _estimate(over_seeds: list[Interval]) -> Estimate:
    values, lows, highs = zip(*over_seeds, strict=True)
    if None in lows or None in highs:
        return Estimate(values)
    return Estimate(values, mean(lows), mean(highs))


def _prepare_data(study: Study, variant: Variant, seed: int, out: Path) -> Path:
    """Return the folder of the sets that a variant uses; write and index them if missing."""
    name = f"{study.name}{'-' * bool(variant.data_kind)}{variant.data_kind}-{seed}"
    folder = out / "data" / name
    if not folder.exists():
        incomplete = folder.with_name(f".{name}.tmp")
        shutil.rmtree(incomplete, ignore_errors=True)
        data_seed = key("reproduce", study.name, variant.data_kind, seed) % (1 << 63)
        try:
            study.write(incomplete, np.random.default_rng(data_seed), variant.data_kind)
            incomplete.rename(folder)
        except OSError as error:
            raise GigabatchError(f"{folder} cannot be written: {error.strerror}.") from error
    for dataset in sorted({shard.parent for shard in folder.glob("*/*.tar")}):
        # Members such as `text.npy` have two dots in their name.
        open_index(str(dataset), settings=IndexSettings(dotted=True))
    return folder


def config_of(study: Study, variant: Variant, seed: int, data: Path, out: Path) -> Config:
    """Build the config of the run of one variant and seed."""
    tree: dict[str, Any] = json.loads(json.dumps(BASE))
    for name, value in {**study.config, **variant.config}.items():
        _set_key(tree, name, _insert_data_path(value, data))
    _set_key(tree, "data.root", str(data))
    run_keys = {"dir": str(out / "runs"), "name": _run_name(study, variant, seed), "seed": seed}
    _set_key(tree, "run", run_keys)
    source = f"reproduce {study.name}, {variant.name}"
    if variant.init_from:
        (first,) = (other for other in study.variants if other.name == variant.init_from)
        parts = parse_config(yaml.safe_dump(tree), source).modalities
        _set_key(tree, "train.init_from", str(out / "runs" / _run_name(study, first, seed)))
        _set_key(tree, "train.init_parts", list(parts))
    return resolve(parse_config(yaml.safe_dump(tree), source))


def _run_name(study: Study, variant: Variant, seed: int) -> str:
    return f"{study.name}-{variant.name}-{seed}"


def _insert_data_path(value: Any, data: Path) -> Any:
    """Replace the placeholder `DATA` in the strings of a config value."""
    if isinstance(value, Mapping):
        return {name: _insert_data_path(item, data) for name, item in value.items()}
    return value.replace(DATA, str(data)) if isinstance(value, str) else value


def _set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _train(
    study: Study, variant: Variant, seed: int, data: Path, out: Path, say: Say, stop: Stop
) -> RunFolder:
    """Return the finished run of a variant; start or resume its training if necessary."""
    config = config_of(study, variant, seed, data, out)
    run = RunFolder(out / "runs" / str(config.run.name))
    exists = (run.path / "config.yaml").exists()
    if exists:
        config = _with_versions_of(run.config(), config)
        _check_same_config(run, config)
    if exists and run.is_finished():
        return run
    start_time = time.monotonic()
    if not exists:
        run = prepare_run(config, study.name)
    with run.lock():
        if exists:
            reopen_run(run, config, [])
        if not run_training(run, stop):
            raise Stopped
    gc.collect()  # the engine has reference cycles; free them before the next engine is built
    seconds = time.monotonic() - start_time
    say(f"  seed {seed}, {variant.name}: {config.train.steps} steps, {seconds:.0f} s")
    return run


def _with_versions_of(old: Config, config: Config) -> Config:
    """Return the config for a run that began with the versions in its own config, `old`."""
    image = config.data.image.model_copy(update={"version": old.data.image.version})
    versions = {"image": image, "fields_version": old.data.fields_version}
    return config.model_copy(update={"data": config.data.model_copy(update=versions)})


def _check_same_config(run: RunFolder, config: Config) -> None:
    """Check that a stored run was trained with this config.

    Raises:
        GigabatchError: if it was not.
    """
    changed = differences(run.config(), config)
    changed.pop("train.init_from", None)  # the stored run names the checkpoint, not the run
    if changed:
        key_, (old, new) = next(iter(changed.items()))
        raise GigabatchError(
            f"{run.path} was trained by a different version of this experiment ({key_}: "
            f"{old!r}, now {new!r}). Remove the folder, or choose a different --out."
        )


def _read_metric(run: RunFolder, metric: Metric, dataset: Path, field: str | None) -> Interval:
    """Read a metric from the run's evaluation files; evaluate first if they are missing."""
    results = (
        best_and_last(run) if metric.task == "history" else _evaluate(run, metric, dataset, field)
    )
    tag = f"eval/{dataset.name}/{metric.tag}"
    if tag not in results:
        raise GigabatchError(
            f"{run.path}: task {metric.task} reports no {tag}; it reports {', '.join(results)}."
        )
    return float(results[tag]), results.get(f"{tag}/low"), results.get(f"{tag}/high")


def _evaluate(run: RunFolder, metric: Metric, dataset: Path, field: str | None) -> dict[str, Any]:
    """Return the stored results of a metric's task; run the task if there are none."""
    task, settings = parse_task(metric.task, metric.settings), metric.settings
    assert isinstance(task, SetTask)
    name = result_name(dataset.name, task.result_tag(), settings)
    file = run.measurement(name, run.steps_saved()[-1])
    if not file.exists():
        context = open_context(run, str(dataset), single_process())
        result = task.measure(context)
        seed = None if field is None else context.config.run.seed
        values = metric_tags(task, result, seed, context.query_groups(field, result))
        run.write_measurement(name, context.step, {**values, "settings": list(settings)})
    results: dict[str, Any] = json.loads(file.read_text())
    return results
