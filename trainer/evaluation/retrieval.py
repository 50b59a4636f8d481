"""Retrieval between two modalities, both ways, exact, sharded over ranks.

Right answers share the query's id, so there may be several. As in the literature on images and
texts, `recall@k` is the share of queries with a right answer among the first k; the ranks are those
of a query's best right answer. Ties count against us (see `ranking`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from gigabatch.data.index import Index
from gigabatch.kernels import gather_rows
from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.embedding import (
    NAMED_BY_NUMBER,
    Embed,
    Embedded,
    Reading,
    embed_set,
)
from gigabatch.trainer.evaluation.ranking import Relevance, rank_queries, summary
from gigabatch.trainer.evaluation.scores import dot_rows
from gigabatch.trainer.runfolder import RunFolder

RECALLS = (1, 5, 10)
NAMES = {"i2t": "image to text", "t2i": "text to image"}
TOLD = "_recall@10"


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
    Between image and text, or the first two modalities that the run has. Keys: `candidates`,
    `mean_recall@10`, and for each way (`i2t`, `t2i`; of others `audio2text`) `..._recall@1|5|10`,
    `..._mrr`, `..._ndcg@10`, `..._r_precision`, `..._mean_rank`, `..._median_rank`.
    """
    reading = Reading(config.modalities[:2], [positives] if positives else [])
    found = embed_set(embed, index, config, run, world, reading, stop)
    if found is None:
        return None
    return retrieval_summary(retrieval_figures(found, positives, world), len(index))


def retrieval_figures(found: Embedded, positives: str | None, world: World) -> dict[str, Tensor]:
    """Figures of every query, float64 [all samples], on every rank; of two modalities that were
    embedded, `A2B_...` and `B2A_...` (of image and text `i2t_...` and `t2i_...`)."""
    ids = found.columns[positives or NAMED_BY_NUMBER]
    (a, first), (b, second) = found.taps.items()
    one, back = ("i2t", "t2i") if (a, b) == ("image", "text") else (f"{a}2{b}", f"{b}2{a}")
    ways = {one: (first, second), back: (second, first)}
    return {
        f"{way}_{name}": values
        for way, (queries, keys) in ways.items()
        for name, values in _one_way(queries, keys, ids, world).items()
    }


def describe(name: str, metrics: Mapping[str, float]) -> str:
    """One line on a set's retrieval."""
    chance = min(1.0, 10 / metrics["candidates"])
    recalls = {way: metrics[f"{way}_recall@10"] for way in _ways(metrics)}
    told = ", ".join(f"{NAMES.get(w, w.replace('2', ' to '))} {r:.3f}" for w, r in recalls.items())
    return (
        f"{name}: recall@10 {metrics['mean_recall@10']:.3f} ({told}; {metrics['candidates']:,.0f} "
        f"candidates, chance {chance:.3f})"
    )


def _ways(names: Iterable[str]) -> list[str]:
    """`i2t`, `t2i` or the like, of the names of figures or metrics."""
    return [name.removesuffix(TOLD) for name in names if name.endswith(TOLD) and "2" in name]


def retrieval_summary(figures: dict[str, Tensor], candidates: int) -> dict[str, float]:
    """What is told of a set, from the figures of its queries."""
    told = {"candidates": float(candidates)}
    ways = _ways(figures)
    for way in ways:
        own = {n.removeprefix(f"{way}_"): v for n, v in figures.items() if n.startswith(f"{way}_")}
        told |= summary(own, f"{way}_")
    both = [told[f"{way}_recall@10"] for way in ways]
    return told | {"mean_recall@10": sum(both) / 2}


def _one_way(queries: Tensor, keys: Tensor, ids: Tensor, world: World) -> dict[str, Tensor]:
    keys, key_ids = gather_rows(keys, world.group), gather_rows(ids, world.group)
    relevance = Relevance.by_id(ids, key_ids)
    found = rank_queries(dot_rows(queries, keys), relevance, len(keys), RECALLS)
    told = {f"recall@{k}": found[f"hit@{k}"] for k in RECALLS}
    told |= {name: found[name] for name in ("mrr", "ndcg@10", "r_precision", "rank")}
    return {name: gather_rows(values, world.group) for name, values in told.items()}
