"""Evaluation of a run while it trains: when it is due, and what is measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config, positives_of
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.retrieval import describe, evaluate_retrieval
from gigabatch.trainer.inputs import open_eval
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)


def evaluation_is_due(step: int, config: Config) -> bool:
    """Between steps; the end of a run is evaluated in any case."""
    every = config.eval.every_steps
    return bool(every) and 0 < step < config.train.steps and step % every == 0


def evaluate_sets(
    towers: Callable[..., Mapping[str, Tensor]],
    config: Config,
    run: RunFolder,
    world: World,
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """The metrics of each of the run's sets, by tag; None where `stop` said to leave off.

    `towers` and `stop`: as in `evaluate_retrieval`. A collective. Raises GigabatchError where
    `checkpoint.best` names none of the metrics.
    """
    found: dict[str, float] = {}
    if config.eval.sets and len(config.modalities) < 2:
        log.warning(
            "eval.sets: not measured: retrieval takes two modalities, and the objective reads %s "
            "alone. Use `gigabatch eval --task knn` or probe.",
            config.modalities[0],
        )
        return found
    for name in config.eval.sets:
        index = open_eval(config, name)
        positives = positives_of(config.objective)
        metrics = evaluate_retrieval(towers, index, config, run, world, positives, stop)
        if metrics is None:
            return None
        found |= {f"eval/{index.name}/{key}": value for key, value in metrics.items()}
        log.info(describe(index.name, metrics))
    best = config.checkpoint.best
    if best and best not in found:
        raise GigabatchError(
            f"checkpoint.best: there is no metric {best}; there are {', '.join(found)}."
        )
    return found
