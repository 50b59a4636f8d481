"""`gigabatch eval`: a finished or running run's newest checkpoint on any set, without DeepSpeed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.data.settings import Settings
from gigabatch.trainer.distributed import World, join_world, leave, single_process
from gigabatch.trainer.evaluation.history import best_and_last
from gigabatch.trainer.evaluation.retrieval import describe
from gigabatch.trainer.evaluation.settings import task_settings
from gigabatch.trainer.evaluation.tags import sliced_tags, tags
from gigabatch.trainer.evaluation.task import Measured, Subject
from gigabatch.trainer.evaluation.tasks import measure
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.run.create import open_run
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What is asked of a run. `on`: the set, which `history` needs none of. `given`: key=value
    settings of the task. `sliced`: fields of the samples' json. `resampled`: the field whose values
    intervals draw, each with all its queries. `weights`: ema or last; None: ema where the run has
    one."""

    task: str
    on: str | None
    given: Sequence[str]
    sliced: Sequence[str]
    intervals: bool
    weights: str | None = None
    resampled: str | None = None


def evaluate_run(where: str, asked: Question, as_json: bool) -> None:
    """Print what the run `where` answers, and keep it in the run's eval/.

    Under torchrun each rank embeds its part, and rank 0 prints and writes. Raises GigabatchError.
    """
    wanted = task_settings(asked.task, asked.given)
    if asked.on is None and asked.task != "history":
        raise GigabatchError(
            f"--on: {asked.task} needs a set. Name a folder of shards (text-retrieval: a JSONL "
            "file, or a folder in the BEIR layout)."
        )
    run = open_run(where)
    with _joined() as world:
        if asked.task != "history":
            _measure(run, world, asked, wanted, as_json)
        elif world.is_main:
            _print(best_and_last(run), as_json)
    if world.size > 1:
        leave(0)


def _joined() -> AbstractContextManager[World]:
    """torchrun's ranks, with as many threads as it gave them; else this process alone."""
    if "RANK" in os.environ:
        return join_world(torch.get_num_threads())
    return nullcontext(single_process())


def _measure(
    run: RunFolder, world: World, asked: Question, wanted: Settings, as_json: bool
) -> None:
    task = asked.task
    step, subject = open_subject(run, str(asked.on), world, asked.weights)
    measured = measure(task, subject, wanted)
    fields = asked.sliced if measured.samples is not None else ()
    values = {field: subject.values(field, required=False) for field in fields}
    groups = subject.groups(asked.resampled, measured)
    if not world.is_main:
        return
    seed = subject.config.run.seed if asked.intervals or asked.resampled else None
    told = tags(task, measured, seed, groups)
    for field in asked.sliced:
        told |= sliced_tags(task, measured, field, values.get(field, ()), seed, groups)
    # Beside the figures of the averaged weights, not over them.
    last = subject.config.train.ema and asked.weights == "last"
    _keep(run, measured, f"{task}-last" if last else task, step, told, asked.given)
    if task == "retrieval" and not as_json:
        print(f"step {step}, {describe(measured.name, measured.metrics())}")
    _print(told, as_json)


def open_subject(
    run: RunFolder, on: str, world: World, weights: str | None = None
) -> tuple[int, Subject]:
    """(step, what is measured) of a run's newest checkpoint."""
    step, towers = load_newest_towers(run, world, weights)
    return step, Subject(run, run.config(), towers.to(world.device), world, on, step)


def kept_name(on: str, task: str, given: Sequence[str]) -> str:
    """What is measured of a set is kept under this name: other settings do not overwrite it."""
    return "-".join((on, task, *sorted(given)))


def _keep(
    run: RunFolder, measured: Measured, task: str, step: int, told: Mapping[str, float],
    given: Sequence[str],
) -> None:  # fmt: skip
    name = kept_name(measured.name, task, given)
    try:
        run.write_measurement(name, step, {**told, "settings": list(given)})
    except OSError as error:  # another's run, which one may read alone
        log.warning("%s: what was found is not kept: %s", run.path / "eval", error.strerror)


def _print(told: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps(told))
        return
    width = max(map(len, told), default=0)
    for name, value in told.items():
        print(f"{name:<{width}}  {value:,.4f}")
