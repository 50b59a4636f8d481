"""Retrieval across modalities, exact, sharded over ranks: between two of them both ways, or of one
from several.

Right answers share the query's id, so there may be several. As in the literature on images and
texts, `recall@k` is the share of queries with a right answer among the first k; the ranks are those
of a query's best right answer. Ties count against us (see `ranking`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

from torch import Tensor

from gigabatch.data.shards.index import Index
from gigabatch.kernels import gather_rows
from gigabatch.trainer.config import Config, singles
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.embedding import (
    NAMED_BY_NUMBER,
    Embedded,
    Reading,
    embed_set,
)
from gigabatch.trainer.evaluation.ranking import Relevance, rank_queries, summary
from gigabatch.trainer.evaluation.score_rows import Rows, score_rows
from gigabatch.trainer.evaluation.taps import compared, place_compared
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.taps import parse_tap

RECALLS = (1, 5, 10)
NAMES = {"i2t": "image to text", "t2i": "text to image"}
TOLD = "_recall@10"


def evaluate_retrieval(
    towers: Callable[..., Mapping[str, Tensor]],
    index: Index,
    config: Config,
    run: RunFolder,
    world: World,
    positives: str | None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Metrics of one indexed set, the same on every rank; None where `stop`, which is asked after
    each micro-batch and must answer alike on every rank, said to leave off.

    `towers`: called as `Towers` are, in evaluation mode. `positives`: the json field that right
    answers share; None: a caption's right answer is its own image.
    Of all that the objective compares (`comparisons`), by vectors, or by tokens where those are
    what it reads. Keys: `candidates`, `mean_recall@10` over all ways, and for each way (`i2t`,
    `t2i`; of others `audio2text`, `image+audio2text`) `..._recall@1|5|10`, `..._mrr`,
    `..._ndcg@10`, `..._r_precision`, `..._mean_rank`, `..._median_rank`.
    """
    figures: dict[str, Tensor] = {}
    for read in comparisons(config):
        reading = Reading(read, [positives] if positives else [])
        embed = compared(towers, place_compared(config, read))
        found = embed_set(embed, index, config, run, world, reading, stop)
        if found is None:
            return None
        figures |= comparison_figures(found, positives, world)
    return retrieval_summary(figures, len(index))


def comparisons(config: Config) -> list[tuple[str, ...]]:
    """What the objective compares: two modalities, which find each other, or the three and more of
    `symile`, each of which all others find together. The run's first two where it compares none."""
    found: list[tuple[str, ...]] = []
    for each in singles(config.objective):
        read = {parse_tap(tap).modality for tap in each.taps}
        ordered = tuple(name for name in config.modalities if name in read)
        together = each.retrieval_score() == "product" and len(read) > 2
        found += [ordered] if together else combinations(ordered, 2)
    return list(dict.fromkeys(found)) or [tuple(config.modalities[:2])]


def comparison_figures(found: Embedded, positives: str | None, world: World) -> dict[str, Tensor]:
    """Of two modalities that were embedded those of both ways; of more, those of each by all
    others, as Symile scores them."""
    if len(found.taps) == 2:
        return retrieval_figures(found, positives, world)
    figures: dict[str, Tensor] = {}
    for find in found.taps:
        given = [name for name in found.taps if name != find]
        figures |= joint_figures(found, given, find, "product", positives, world)
    return figures


def way_names(a: str, b: str) -> tuple[str, str]:
    """What retrieval of `b` by `a` is called, and that of `a` by `b`."""
    return ("i2t", "t2i") if (a, b) == ("image", "text") else (f"{a}2{b}", f"{b}2{a}")


def retrieval_figures(found: Embedded, positives: str | None, world: World) -> dict[str, Tensor]:
    """Figures of every query, float64 [all samples], on every rank; of two modalities that were
    embedded, `A2B_...` and `B2A_...` (of image and text `i2t_...` and `t2i_...`). Of tokens each
    way has a score of its own, the mean over the tokens of what asks."""
    ids = found.columns[positives or NAMED_BY_NUMBER]
    a, b = found.taps
    one, back = way_names(a, b)
    first, second = found.rows(a), found.rows(b)
    there = _one_way(one, first, second, ids, world)
    return there | _one_way(back, second, first, ids, world)


def joint_figures(
    found: Embedded,
    given: Sequence[str],
    find: str,
    score: str,
    positives: str | None,
    world: World,
) -> dict[str, Tensor]:
    """Figures of the retrieval of one modality by several, `A+C2B_...`, as in `retrieval_figures`.

    `score`: "product", sum_d a_d c_d b_d (Symile, number 34), or "sum", a . b + c . b.
    """
    parts = [found.taps[name].double() for name in given]
    queries = math.prod(parts[1:], start=parts[0]) if score == "product" else sum(parts)
    assert isinstance(queries, Tensor)
    ids, way = found.columns[positives or NAMED_BY_NUMBER], f"{'+'.join(given)}2{find}"
    return _one_way(way, Rows(queries), found.rows(find), ids, world)


def describe(name: str, metrics: Mapping[str, float]) -> str:
    """One line on a set's retrieval."""
    chance = min(1.0, 10 / metrics["candidates"])
    recalls = {_in_words(way): metrics[f"{way}_recall@10"] for way in _ways(metrics)}
    mean = sum(recalls.values()) / len(recalls)
    told = ", ".join(f"{w} {r:.3f}" if len(recalls) > 1 else w for w, r in recalls.items())
    return (
        f"{name}: recall@10 {mean:.3f} ({told}; {metrics['candidates']:,.0f} "
        f"candidates, chance {chance:.3f})"
    )


def _in_words(way: str) -> str:
    return NAMES.get(way) or way.replace("2", " to ").replace("+", " and ")


def _ways(names: Iterable[str]) -> list[str]:
    """`i2t`, `t2i` or the like, of the names of figures or metrics."""
    return [name.removesuffix(TOLD) for name in names if name.endswith(TOLD) and "2" in name]


def retrieval_summary(figures: Mapping[str, Tensor], candidates: int) -> dict[str, float]:
    """What is told of a set, from the figures of its queries; of several ways also the mean."""
    told = {"candidates": float(candidates)}
    ways = _ways(figures)
    for way in ways:
        own = {n.removeprefix(f"{way}_"): v for n, v in figures.items() if n.startswith(f"{way}_")}
        told |= summary(own, f"{way}_")
    each = [told[f"{way}_recall@10"] for way in ways]
    return told | ({"mean_recall@10": sum(each) / len(each)} if len(each) > 1 else {})


def _one_way(way: str, queries: Rows, keys: Rows, ids: Tensor, world: World) -> dict[str, Tensor]:
    keys, key_ids = keys.gathered(world.group), gather_rows(ids, world.group)
    relevance = Relevance.by_id(ids, key_ids)
    found = rank_queries(score_rows(queries, keys), relevance, len(key_ids), RECALLS)
    told = {f"recall@{k}": found[f"hit@{k}"] for k in RECALLS}
    told |= {name: found[name] for name in ("mrr", "ndcg@10", "r_precision", "rank")}
    return {f"{way}_{name}": gather_rows(values, world.group) for name, values in told.items()}
