"""Retrieval metrics across modalities: between two in both directions, or of one by several.

Relevant items share the query's id, so a query may have several. As in the image-text literature,
`recall@k` is the share of queries with a relevant item among the first k (`hit@k` in `ranking`).
Ranks are those of a query's best relevant item. Ties count against the model.

The direction in which A retrieves B is named `A2B`; those of image and text are `i2t` and `t2i`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from gigabatch.kernels import gather_rows
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.embedding import SAMPLE_COLUMN, Embedded
from gigabatch.trainer.evaluation.metrics.ranking import Relevance, rank_queries, summarize
from gigabatch.trainer.evaluation.metrics.score_rows import Rows, score_rows

RECALL_KS = (1, 5, 10)
DIRECTION_TITLES = {"i2t": "image to text", "t2i": "text to image"}
HEADLINE = "_recall@10"
"""Suffix of the metric that is averaged over directions."""


def comparison_values(embedded: Embedded, positives: str | None, world: World) -> dict[str, Tensor]:
    """Compute the values of every query, for all directions among the embedded modalities.

    Two modalities retrieve each other. With three or more, each is retrieved by all others, scored
    by the product as in Symile. For arguments and result, see `retrieval_values`.
    """
    if len(embedded.outputs) == 2:
        return retrieval_values(embedded, positives, world)
    values: dict[str, Tensor] = {}
    for target in embedded.outputs:
        sources = [name for name in embedded.outputs if name != target]
        values |= joint_retrieval_values(embedded, sources, target, "product", positives, world)
    return values


def direction_names(a: str, b: str) -> tuple[str, str]:
    """Return the names of two directions: `a` retrieves `b`, and `b` retrieves `a`."""
    return ("i2t", "t2i") if (a, b) == ("image", "text") else (f"{a}2{b}", f"{b}2{a}")


def retrieval_values(embedded: Embedded, positives: str | None, world: World) -> dict[str, Tensor]:
    """Compute the values of every query for two modalities, in both directions.

    With tokens, the scores differ by direction, because they are means over the query's tokens.

    Args:
        embedded: This rank's rows of two modalities.
        positives: Column of `embedded` whose value relevant items share; None means that only the
            sample itself is relevant.
        world: The ranks; every rank must call this function.

    Returns:
        `A2B_METRIC` -> float64 [N], one value per query, on every rank.
    """
    ids = embedded.columns[positives or SAMPLE_COLUMN]
    a, b = embedded.outputs
    forward, backward = direction_names(a, b)
    first, second = embedded.rows(a), embedded.rows(b)
    values = _one_direction(forward, first, second, ids, world)
    return values | _one_direction(backward, second, first, ids, world)


def joint_retrieval_values(
    embedded: Embedded,
    sources: Sequence[str],
    target: str,
    score: str,
    positives: str | None,
    world: World,
) -> dict[str, Tensor]:
    """Compute the values of every query for one modality retrieved by several together.

    Args:
        embedded: This rank's rows of all these modalities.
        sources: Modalities of the query.
        target: Modality that is retrieved.
        score: `product` for sum_d a_d c_d b_d (Symile), `sum` for a . b + c . b.
        positives: See `retrieval_values`.
        world: The ranks; every rank must call this function.

    Returns:
        `A+C2B_METRIC` -> float64 [N], one value per query, on every rank.
    """
    # Products are float64 and rounded once, by the scorer, so equal tuples have equal scores.
    parts = [embedded.outputs[name].double() for name in sources]
    queries = math.prod(parts[1:], start=parts[0]) if score == "product" else sum(parts)
    assert isinstance(queries, Tensor)
    ids = embedded.columns[positives or SAMPLE_COLUMN]
    direction = f"{'+'.join(sources)}2{target}"
    return _one_direction(direction, Rows(queries), embedded.rows(target), ids, world)


def _one_direction(
    direction: str, queries: Rows, keys: Rows, ids: Tensor, world: World
) -> dict[str, Tensor]:
    """Rank this rank's queries against all ranks' keys; gather the values."""
    keys, key_ids = keys.gathered(world.group), gather_rows(ids, world.group)
    relevance = Relevance.by_id(ids, key_ids)
    ranked = rank_queries(score_rows(queries, keys), relevance, len(key_ids), RECALL_KS)
    values = {f"recall@{k}": ranked[f"hit@{k}"] for k in RECALL_KS}
    values |= {name: ranked[name] for name in ("mrr", "ndcg@10", "r_precision", "rank")}
    return {f"{direction}_{name}": gather_rows(rows, world.group) for name, rows in values.items()}


def summarize_retrieval(values: Mapping[str, Tensor], candidates: int) -> dict[str, float]:
    """Average the values of each direction.

    Args:
        values: From `retrieval_values` or `joint_retrieval_values`.
        candidates: Number of keys.

    Returns:
        `candidates`, the metrics of each direction, and with several directions `mean_recall@10`.
    """
    metrics = {"candidates": float(candidates)}
    directions = _directions(values)
    for direction in directions:
        prefix = f"{direction}_"
        selected = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
        metrics |= summarize(selected, prefix)
    recalls = [metrics[f"{direction}_recall@10"] for direction in directions]
    mean = {"mean_recall@10": sum(recalls) / len(recalls)} if len(recalls) > 1 else {}
    return metrics | mean


def describe_retrieval(set_name: str, metrics: Mapping[str, float]) -> str:
    """Describe the retrieval metrics of a set in one line."""
    chance = min(1.0, 10 / metrics["candidates"])
    recalls = {_title(name): metrics[f"{name}_recall@10"] for name in _directions(metrics)}
    mean = sum(recalls.values()) / len(recalls)
    details = ", ".join(f"{d} {r:.3f}" if len(recalls) > 1 else d for d, r in recalls.items())
    return (
        f"{set_name}: recall@10 {mean:.3f} ({details}; {metrics['candidates']:,.0f} "
        f"candidates, chance {chance:.3f})"
    )


def _title(direction: str) -> str:
    return DIRECTION_TITLES.get(direction) or direction.replace("2", " to ").replace("+", " and ")


def _directions(names: Iterable[str]) -> list[str]:
    """List the directions, such as `i2t`, that occur in names of values or metrics."""
    recalls = [name for name in names if name.endswith(HEADLINE) and "2" in name]
    return [name.removesuffix(HEADLINE) for name in recalls]
