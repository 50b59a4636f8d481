"""`gigabatch eval`: a finished or running run's newest checkpoint on any set, without DeepSpeed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.distributed import World, device_of_this_process
from gigabatch.trainer.evaluation.history import best_and_last
from gigabatch.trainer.evaluation.report import sliced_tags, tags
from gigabatch.trainer.evaluation.retrieval import describe
from gigabatch.trainer.evaluation.settings import task_settings
from gigabatch.trainer.evaluation.tasks import Measured, Subject, measure
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.runfolder import RunFolder
from gigabatch.trainer.runs import open_run

log = logging.getLogger(__name__)


def evaluate_run(
    where: str,
    task: str,
    on: str | None,
    given: Sequence[str],
    sliced: Sequence[str],
    with_intervals: bool,
    as_json: bool,
    weights: str | None = None,
) -> None:
    """Print what `task` finds of the run `where` on the set `on`, and keep it in the run's eval/.

    `given`: key=value settings of the task. `sliced`: fields of the samples' json. `weights`: ema
    or last; unset: ema where the run has one. Raises GigabatchError.
    """
    wanted = task_settings(task, given)
    if task == "history":
        _print(best_and_last(open_run(where)), as_json)
        return
    if on is None:
        raise GigabatchError(
            f"--on: {task} needs a set. Name a folder of shards (text-retrieval: a JSONL file, or "
            "a folder in the BEIR layout)."
        )
    run = open_run(where)
    config = run.config()
    step, towers = load_newest_towers(run, weights)
    world = World(0, 1, device_of_this_process(), None)
    subject = Subject(run, config, towers.to(world.device), world, on)
    measured = measure(task, subject, wanted)
    seed = config.run.seed if with_intervals else None
    told = tags(task, measured, seed)
    for field in sliced:
        values = subject.values(field, required=False) if measured.samples is not None else []
        told |= sliced_tags(task, measured, field, values, seed)
    # Beside the figures of the averaged weights, not over them.
    kept_as = f"{task}-last" if config.train.ema and weights == "last" else task
    _keep(run, measured, kept_as, step, told, given)
    if task == "retrieval" and not as_json:
        print(f"step {step}, {describe(measured.name, measured.metrics())}")
        told = {
            name: told[name] for name in told if "=" in name or name.endswith(("/low", "/high"))
        }
    _print(told, as_json)


def _keep(
    run: RunFolder, measured: Measured, task: str, step: int, told: Mapping[str, float],
    given: Sequence[str],
) -> None:  # fmt: skip
    try:
        run.write_measurement(measured.name, task, step, {**told, "settings": list(given)})
    except OSError as error:  # another's run, which one may read alone
        log.warning("%s: what was found is not kept: %s", run.path / "eval", error.strerror)


def _print(told: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps(told))
        return
    width = max(map(len, told), default=0)
    for name, value in told.items():
        print(f"{name:<{width}}  {value:,.4f}")
