"""Image-text retrieval: recall@k and median rank, both ways, exact, sharded over ranks.

The rank of a query is 1 + the number of wrong candidates that score at least as well as its best
right one: ties count against us. Right answers share the query's id, so there may be several.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gigabatch.data.index import Index
from gigabatch.data.plans import EvalPlans
from gigabatch.data.stream import open_stream
from gigabatch.kernels import Eq, Ne, gather_rows, key_source, pair_sum, row_top
from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.inputs import cache_of, eval_fields
from gigabatch.trainer.runfolder import RunFolder
from gigabatch.trainer.step import tower_inputs

log = logging.getLogger(__name__)
RECALLS = (1, 5, 10)
Embed = Callable[[Mapping[str, tuple[Tensor, ...]]], Mapping[str, Tensor]]


@torch.no_grad()
def evaluate_retrieval(
    embed: Embed,
    index: Index,
    config: Config,
    run: RunFolder,
    world: World,
    positives: str | None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Metrics of one indexed set, the same on every rank; None where `stop`, which is asked after
    each micro-batch and must answer alike on every rank, said to leave off.

    `embed`: towers' inputs to {image, text}: [B, D], in evaluation mode. `positives`: the json
    field that right answers share; None: a caption's right answer is its own image.
    Keys: `candidates`, `i2t_recall@1|5|10`, `t2i_recall@...`, `mean_recall@10`, `i2t_median_rank`,
    `t2i_median_rank`.
    """
    plans = EvalPlans(len(index), config.batch.micro_size, world.size, world.rank)
    stream = open_stream(
        [index],
        plans,
        fields=eval_fields(config, [positives] if positives else []),
        tokenizer=run.tokenizer,
        seed=config.run.seed,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        cache=cache_of(config),
    )
    rows: dict[str, list[Tensor]] = {"image": [], "text": [], "id": []}
    bad: list[str] = []
    for micro in stream:
        if micro.real:
            bad += [each.why for each in micro.bad]
        batch = micro.to(world.device)
        kept = slice(None) if batch.real else slice(0)
        for tap, vectors in embed(tower_inputs(batch, config.data, stream=None)).items():
            rows[tap].append(vectors[kept])
        rows["id"].append(batch.tensors[positives or "sample"][kept])
        if stop():
            return None
    _tell_bad([why for rank in world.gather(bad) for why in rank], index, world)
    image, text, ids = (torch.cat(rows[name]) for name in ("image", "text", "id"))
    i2t = _ranks(image, text, ids, world)
    t2i = _ranks(text, image, ids, world)
    return {
        "candidates": float(len(index)),
        **_summary("i2t", i2t),
        **_summary("t2i", t2i),
        "mean_recall@10": (_recall(i2t, 10) + _recall(t2i, 10)) / 2,
    }


def describe(name: str, metrics: Mapping[str, float]) -> str:
    """One line on a set's retrieval."""
    i2t, t2i = metrics["i2t_recall@10"], metrics["t2i_recall@10"]
    chance = min(1.0, 10 / metrics["candidates"])
    return (
        f"{name}: recall@10 {(i2t + t2i) / 2:.3f} (image to text {i2t:.3f}, text to image "
        f"{t2i:.3f}; {metrics['candidates']:,.0f} candidates, chance {chance:.3f})"
    )


def _tell_bad(bad: list[str], index: Index, world: World) -> None:
    if bad and world.is_main:
        log.warning(
            "%s: %d of %d samples cannot be used, and others were measured in their place; the "
            "first: %s",
            index.source, len(bad), len(index), bad[0],
        )  # fmt: skip


def _ranks(queries: Tensor, keys: Tensor, ids: Tensor, world: World) -> Tensor:
    """int64 [all queries]: rank of the best right answer among all keys, from 1. Two score passes,
    no matrix; a score that is NaN counts against us."""
    source = key_source(keys, {"id": ids}, world.group)
    best, _ = row_top(queries, source, 1, (Eq(ids, "id"),))
    one = best.new_ones(())
    not_below = pair_sum(queries, source, "step", one, -best[:, 0], rule=(Ne(ids, "id"),))
    return gather_rows(1 + not_below.long(), world.group)


def _summary(way: str, ranks: Tensor) -> dict[str, float]:
    recalls = {f"{way}_recall@{k}": _recall(ranks, k) for k in RECALLS}
    return {**recalls, f"{way}_median_rank": float(ranks.median())}


def _recall(ranks: Tensor, k: int) -> float:
    return float((ranks <= k).double().mean())
