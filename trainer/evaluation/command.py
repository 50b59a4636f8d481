"""Command `gigabatch eval`: measure a run's newest checkpoint on a set, without DeepSpeed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from gigabatch.trainer.distributed import World, exit_now, join_world, single_process
from gigabatch.trainer.evaluation.context import EvalContext
from gigabatch.trainer.evaluation.progress import Show, showing
from gigabatch.trainer.evaluation.result import TaskResult
from gigabatch.trainer.evaluation.tags import metric_tags, slice_tags
from gigabatch.trainer.evaluation.task import EvalTask, RunTask, SetTask
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalRequest:
    """A request to `gigabatch eval`.

    Attributes:
        task: The task with its settings.
        set_argument: The set; None for a task that reads only the run.
        settings: The `key=value` texts that `task` was parsed from.
        slice_fields: JSON fields to slice by.
        intervals: Add bootstrap intervals over queries.
        weights: `ema` or `last`; None means `ema` if the run has it.
        intervals_by: Add bootstrap intervals over the values of this JSON field.
    """

    task: EvalTask
    set_argument: str | None
    settings: Sequence[str]
    slice_fields: Sequence[str]
    intervals: bool
    weights: str | None = None
    intervals_by: str | None = None


def evaluate_run(
    run: RunFolder, request: EvalRequest, as_json: bool, show: Show | None = None
) -> None:
    """Measure a run, print the metrics, and write them to the run's eval/.

    Under torchrun the ranks share the work; rank 0 prints and writes.

    Args:
        run: The run.
        request: What to measure.
        as_json: Print one JSON object.
        show: Shows the progress of loops.

    Raises:
        GigabatchError: if the run or the set lacks what the task reads.
    """
    with _joined_world() as world:
        if isinstance(request.task, RunTask):
            if world.is_main:
                _print(request.task.read(run), as_json)
        else:
            assert isinstance(request.task, SetTask)
            with showing(show if world.is_main else None):
                _measure(run, world, request, request.task, as_json)
    if world.size > 1:
        exit_now(0)


def _joined_world() -> AbstractContextManager[World]:
    """Join torchrun's ranks with the threads that it set; otherwise run in this process only."""
    if "RANK" in os.environ:
        return join_world(torch.get_num_threads())
    return nullcontext(single_process())


def _measure(
    run: RunFolder, world: World, request: EvalRequest, task: SetTask, as_json: bool
) -> None:
    """Measure a set; rank 0 prints and writes the metrics."""
    context = open_context(run, str(request.set_argument), world, request.weights)
    result = task.measure(context)
    # Every rank reads labels and groups, because the reads are collective.
    fields = request.slice_fields if result.sample_indices is not None else ()
    labels = {field: context.field_values(field, required=False) for field in fields}
    for field, values in labels.items():
        if world.is_main and (missing := values.count(None)):
            log.warning(
                "--slice %s: %d of %d samples have no value (it is absent, null, NaN or empty); "
                "they are in the slice %s=None", field, missing, len(values), field,
            )  # fmt: skip
    groups = context.query_groups(request.intervals_by, result)
    if not world.is_main:
        return
    seed = context.config.run.seed if request.intervals or request.intervals_by else None
    metrics = metric_tags(task, result, seed, groups)
    for field in request.slice_fields:
        metrics |= slice_tags(task, result, field, labels.get(field, ()), seed, groups)
    # Results of the last weights must not overwrite those of the average.
    last = context.config.train.ema and request.weights == "last"
    tag = f"{task.result_tag()}-last" if last else task.result_tag()
    _write(run, result, tag, context.step, metrics, request.settings)
    if (headline := task.headline(result)) and not as_json:
        print(f"step {context.step}, {headline}")
    _print(metrics, as_json)


def open_context(
    run: RunFolder, set_argument: str, world: World, weights: str | None = None
) -> EvalContext:
    """Load the towers of a run's newest checkpoint for measuring a set.

    Args:
        run: Folder of the run.
        set_argument: Folder of the set, or its name in the run's `data.root`.
        world: The ranks.
        weights: `ema` or `last`; None means `ema` if the run has it.
    """
    step, towers = load_newest_towers(run, world, weights)
    return EvalContext(run, run.config(), towers.to(world.device), world, set_argument, step)


def result_name(set_name: str, tag: str, settings: Sequence[str]) -> str:
    """Name the result of a task; results with different settings have different names."""
    return "-".join((set_name, tag, *sorted(settings)))


def _write(
    run: RunFolder, result: TaskResult, tag: str, step: int, metrics: Mapping[str, float],
    settings: Sequence[str],
) -> None:  # fmt: skip
    name = result_name(result.set_name, tag, settings)
    try:
        run.write_measurement(name, step, {**metrics, "settings": list(settings)})
    except OSError as error:  # the run may belong to another user
        log.warning("%s: cannot write evaluation results: %s", run.path / "eval", error.strerror)


def _print(metrics: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps(metrics))
        return
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:,.4f}")
