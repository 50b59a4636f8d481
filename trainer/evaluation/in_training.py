"""Evaluation while a run trains: when it is due, and retrieval on the run's sets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.index import Index
from gigabatch.trainer.config import Config, positives_of
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.comparisons import choose_output, comparisons
from gigabatch.trainer.evaluation.embedding import EmbedSpec, embed_set
from gigabatch.trainer.evaluation.metrics.retrieval import (
    comparison_values,
    describe_retrieval,
    summarize_retrieval,
)
from gigabatch.trainer.evaluation.taps import comparison_reader
from gigabatch.trainer.inputs import open_eval
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)


def evaluation_is_due(step: int, config: Config) -> bool:
    """Return whether to evaluate after this step; false for the last, which is always evaluated."""
    every = config.eval.every_steps
    return bool(every) and 0 < step < config.train.steps and step % every == 0


def evaluate_sets(
    towers: Callable[..., Mapping[str, Tensor]],
    config: Config,
    run: RunFolder,
    world: World,
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Measure retrieval on every set of `eval.sets`; every rank must call this.

    Args:
        towers: Function with the arguments of `Towers.forward`, in evaluation mode.
        config: Config of the run.
        run: Folder of the run.
        world: The ranks.
        stop: See `evaluate_retrieval`.

    Returns:
        Metrics by tag, or None if `stop` returned true.

    Raises:
        GigabatchError: if `checkpoint.best` is not among the metrics.
    """
    metrics: dict[str, float] = {}
    if config.eval.sets and len(config.modalities) < 2:
        log.warning(
            "eval.sets: skipped: retrieval needs two modalities, and the objective reads only %s. "
            "Use `gigabatch eval --task knn` or probe.",
            config.modalities[0],
        )
        return metrics
    for name in config.eval.sets:
        index = open_eval(config, name)
        positives = positives_of(config.objective)
        of_set = evaluate_retrieval(towers, index, config, run, world, positives, stop)
        if of_set is None:
            return None
        metrics |= {f"eval/{index.name}/{key}": value for key, value in of_set.items()}
        log.info(describe_retrieval(index.name, of_set))
    check_best(config, metrics)
    return metrics


def check_best(config: Config, metrics: Mapping[str, float]) -> None:
    """Check that `checkpoint.best` is among the metrics of an evaluation, by tag.

    Raises:
        GigabatchError: if it is not.
    """
    best = config.checkpoint.best
    if best and best not in metrics:
        raise GigabatchError(
            f"checkpoint.best: there is no metric {best}. Set it to one of {', '.join(metrics)}."
        )


def evaluate_retrieval(
    towers: Callable[..., Mapping[str, Tensor]],
    index: Index,
    config: Config,
    run: RunFolder,
    world: World,
    positives: str | None,
    stop: Callable[[], bool] = lambda: False,
    limit: int | None = None,
) -> dict[str, float] | None:
    """Measure retrieval on one set, for everything that the objective compares.

    Compares vectors, or tokens if the objective reads tokens instead of vectors.

    Args:
        towers: Function with the arguments of `Towers.forward`, in evaluation mode.
        index: The set.
        config: Config of the run.
        run: Folder of the run.
        world: The ranks; every rank must call this function.
        positives: JSON field that relevant items share; None pairs samples with themselves.
        stop: Called after each micro-batch; returns the same on every rank. True stops.
        limit: Largest number of samples, the first of the set; None measures all.

    Returns:
        Metrics by name, the same on every rank, or None if `stop` returned true. They are
        `candidates`, `mean_recall@10` over all directions, and for each direction (`i2t`, `t2i`,
        `audio2text`, `image+audio2text`) `..._recall@1|5|10`, `..._mrr`, `..._ndcg@10`,
        `..._r_precision`, `..._mean_rank` and `..._median_rank`.
    """
    values: dict[str, Tensor] = {}
    for modalities in comparisons(config):
        spec = EmbedSpec(modalities, [positives] if positives else [])
        embed = comparison_reader(towers, choose_output(config, modalities))
        embedded = embed_set(embed, index, config, run, world, spec, stop, limit)
        if embedded is None:
            return None
        values |= comparison_values(embedded, positives, world)
    return summarize_retrieval(values, min(len(index), limit or len(index)))
