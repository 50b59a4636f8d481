"""Runs a study: for each start its data, a run for each arm, their evaluations, and the figures.

Everything lies in ordinary folders, and what is there already is used again: after a Ctrl-C or a
kill the same command goes on, an unfinished run from its last checkpoint.
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
    Arm,
    Figure,
    Figures,
    Measure,
    Study,
)
from gigabatch.launcher.start import prepare_run, reopen_run
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import differences, parse_config, resolve
from gigabatch.trainer.distributed import alone
from gigabatch.trainer.evaluation.command import open_context, result_name
from gigabatch.trainer.evaluation.registry import parse_task
from gigabatch.trainer.evaluation.tags import metric_tags
from gigabatch.trainer.evaluation.task import SetTask
from gigabatch.trainer.evaluation.tasks.history import best_and_last
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.folder import RunFolder

Say = Callable[[str], None]
Stop = Callable[[], bool]
Ends = tuple[float, float | None, float | None]
"""A figure of one run, and its interval where it has one."""

BASE = {
    "cluster": {"launcher": "inline", "workers": 1, "threads": 1},
    "checkpoint": {"every_minutes": 5, "keep": 1},
    "data": {"train": "train", "workers": 0},
    "monitor": {"every_steps": 50},
    "schedule": {"warmup_steps": 20},
    "eval": {"sets": []},
}


class Stopped(Exception):
    """A stop was asked for; the run in progress has a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    study: Study
    starts: int
    figures: Figures
    seconds: float

    @property
    def holds(self) -> bool:
        return all(bar.holds(self.figures) for bar in self.study.bars)


def run_study(study: Study, starts: int, out: Path, say: Say, stop: Stop) -> Outcome:
    """Train and measure every arm from every start, in `out`. Raises GigabatchError, and Stopped
    where `stop` said to leave off."""
    began = time.monotonic()
    found: dict[str, dict[str, list[Ends]]] = {arm.name: {} for arm in study.arms}
    for start in range(starts):
        for arm in study.arms:
            data = _data(study, arm, start, out)
            run = _trained(study, arm, start, data, out, say, stop)
            for measure in filter(lambda each: each.is_of(arm), study.measures):
                told = _figure(run, measure, data / measure.on, study.intervals)
                found[arm.name].setdefault(measure.figure, []).append(told)
            if stop():
                raise Stopped
    figures = {
        arm: {name: _over_starts(each) for name, each in of.items()} for arm, of in found.items()
    }
    return Outcome(study, starts, figures, time.monotonic() - began)


def _over_starts(each: list[Ends]) -> Figure:
    values, lows, highs = zip(*each, strict=True)
    if None in lows or None in highs:
        return Figure(values)
    return Figure(values, mean(lows), mean(highs))


def _data(study: Study, arm: Arm, start: int, out: Path) -> Path:
    """The sets that an arm is trained and measured on, written where they are not there yet."""
    name = f"{study.name}{'-' * bool(arm.data)}{arm.data}-{start}"
    folder = out / "data" / name
    if not folder.exists():
        fresh = folder.with_name(f".{name}.tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        seed = key("reproduce", study.name, arm.data, start) % (1 << 63)
        try:
            study.write(fresh, np.random.default_rng(seed), arm.data)
            fresh.rename(folder)
        except OSError as error:
            raise GigabatchError(f"{folder} cannot be written: {error.strerror}.") from error
    for each in sorted({shard.parent for shard in folder.glob("*/*.tar")}):
        open_index(str(each), settings=IndexSettings(dotted=True))  # members such as `text.npy`
    return folder


def config_of(study: Study, arm: Arm, start: int, data: Path, out: Path) -> Config:
    """The run of an arm from a start."""
    tree: dict[str, Any] = json.loads(json.dumps(BASE))
    for name, value in {**study.config, **arm.config}.items():
        _set(tree, name, _placed(value, data))
    _set(tree, "data.root", str(data))
    _set(tree, "run", {"dir": str(out / "runs"), "name": _name(study, arm, start), "seed": start})
    where = f"reproduce {study.name}, {arm.name}"
    if arm.begins_with:
        (first,) = (each for each in study.arms if each.name == arm.begins_with)
        parts = parse_config(yaml.safe_dump(tree), where).modalities
        _set(tree, "train.init_from", str(out / "runs" / _name(study, first, start)))
        _set(tree, "train.init_parts", list(parts))
    return resolve(parse_config(yaml.safe_dump(tree), where))


def _name(study: Study, arm: Arm, start: int) -> str:
    return f"{study.name}-{arm.name}-{start}"


def _placed(value: Any, data: Path) -> Any:
    """A value of a config, with the folder of the data in its texts."""
    if isinstance(value, Mapping):
        return {name: _placed(each, data) for name, each in value.items()}
    return value.replace(DATA, str(data)) if isinstance(value, str) else value


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _trained(
    study: Study, arm: Arm, start: int, data: Path, out: Path, say: Say, stop: Stop
) -> RunFolder:
    """The finished run of an arm; trained, or trained on, where it is not finished."""
    config = config_of(study, arm, start, data, out)
    run = RunFolder(out / "runs" / str(config.run.name))
    is_here = (run.path / "config.yaml").exists()
    if is_here:
        _refuse_other(run, config)
    if is_here and run.is_finished():
        return run
    began = time.monotonic()
    if not is_here:
        run = prepare_run(config, study.name)
    with run.held():
        if is_here:
            reopen_run(run, config, [])
        if not run_training(run, stop):
            raise Stopped
    gc.collect()  # the engine's cycles, before the next one is built
    say(
        f"  start {start}, {arm.name}: {config.train.steps} steps, {time.monotonic() - began:.0f} s"
    )
    return run


def _refuse_other(run: RunFolder, config: Config) -> None:
    changed = differences(run.config(), config)
    changed.pop("train.init_from", None)  # a run has the checkpoint that it was
    if changed:
        key_, (old, new) = next(iter(changed.items()))
        raise GigabatchError(
            f"{run.path} is of another version of this experiment ({key_}: {old!r}, now {new!r}). "
            "Remove it, or choose another --out."
        )


def _figure(run: RunFolder, measure: Measure, on: Path, field: str | None) -> Ends:
    """Read from the evaluation files of the run; measured first where it is not there."""
    told = best_and_last(run) if measure.task == "history" else _measured(run, measure, on, field)
    tag = f"eval/{on.name}/{measure.metric}"
    if tag not in told:
        raise GigabatchError(f"{run.path}: {measure.task} tells no {tag}; it tells {list(told)}.")
    return float(told[tag]), told.get(f"{tag}/low"), told.get(f"{tag}/high")


def _measured(run: RunFolder, measure: Measure, on: Path, field: str | None) -> dict[str, Any]:
    task, given = parse_task(measure.task, measure.settings), measure.settings
    assert isinstance(task, SetTask)
    name = result_name(on.name, task.result_tag(), given)
    kept = run.measurement(name, run.steps_saved()[-1])
    if not kept.exists():
        context = open_context(run, str(on), alone())
        result = task.measure(context)
        seed = None if field is None else context.config.run.seed
        metrics = metric_tags(task, result, seed, context.query_groups(field, result))
        run.write_measurement(name, context.step, {**metrics, "settings": list(given)})
    found: dict[str, Any] = json.loads(kept.read_text())
    return found
