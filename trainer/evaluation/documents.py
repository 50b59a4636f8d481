"""Retrieval of documents by the text tower, beside a lexical baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gigabatch.data.text.corpora import open_collection
from gigabatch.kernels import gather_rows
from gigabatch.trainer.evaluation import settings as keys
from gigabatch.trainer.evaluation.embedding import embed_texts
from gigabatch.trainer.evaluation.lexical import tfidf_rows
from gigabatch.trainer.evaluation.ranking import Relevance, rank_queries
from gigabatch.trainer.evaluation.score_rows import Rows, Scorer, score_rows
from gigabatch.trainer.evaluation.statistics import order_accuracy
from gigabatch.trainer.evaluation.taps import compared, place_compared
from gigabatch.trainer.evaluation.task import Measured, Subject

TEXT_CUTS = (1, 5, 10, 100)
TOLD_OF_TEXTS = ("hit@1", "ndcg@10", "mrr", "map", "r_precision", "rank")


def measure_text_retrieval(subject: Subject, wanted: keys.TextRetrieval) -> Measured:
    source, world = Path(subject.on), subject.world
    held = open_collection(source, wanted.split)
    queries = [wanted.query_prefix + text for text in held.queries]
    documents = [wanted.document_prefix + text for text in held.documents]
    embed = compared(subject.towers, place_compared(subject.config, ["text"], wanted.tap))
    q, d = (
        embed_texts(embed, texts, subject.config, subject.run, world).gathered(world.group)
        for texts in (queries, documents)
    )
    device = q.values.device
    edges = [len(queries) * rank // world.size for rank in range(world.size + 1)]
    own = slice(edges[world.rank], edges[world.rank + 1])
    rows, right, grades = zip(*held.judgments, strict=True)
    relevance = Relevance.by_pairs(
        torch.tensor(rows),
        torch.tensor(right),
        torch.tensor(grades, dtype=torch.float64),
        len(queries),
        torch.tensor(held.own_documents),
    ).to(device)
    lexical = tfidf_rows(held.queries, held.documents)
    figures = {}
    scorers: dict[str, Scorer] = {
        "": score_rows(q, d), "tfidf_": lambda part: lexical(part).to(device),
    }  # fmt: skip
    for prefix, score in scorers.items():
        mine = rank_queries(
            _shifted(score, own.start), relevance.part(own), len(documents), TEXT_CUTS
        )
        for name in (*TOLD_OF_TEXTS, *(f"recall@{k}" for k in TEXT_CUTS)):
            figures[prefix + name] = gather_rows(mine[name], world.group)
    told = {"documents": float(len(documents)), "queries": float(len(queries))}
    if held.triples:
        told["order_accuracy"] = _order_of_triples(q, d, held.triples)
    return Measured(held.name, figures, told=told)


def _shifted(score: Scorer, first: int) -> Scorer:
    return lambda part: score(slice(part.start + first, part.stop + first))


def _order_of_triples(q: Rows, d: Rows, orders: Sequence[Any]) -> float:
    """The share of (anchor, positive, negatives) whose positive is above all negatives."""
    right = []
    for query, document, wrong in orders:
        scores = score_rows(q.take([query]), d.take([document, *wrong]))(slice(0, 1))
        right.append(order_accuracy(scores[0, :1], scores[:, 1:]))
    return float(torch.cat(right).mean())
