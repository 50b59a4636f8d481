"""Task `text-retrieval`: queries retrieve documents, with a TF-IDF baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import SetTask

if TYPE_CHECKING:
    from torch import Tensor

    from gigabatch.data.text.corpora import RetrievalCollection
    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.metrics.ranking import Relevance
    from gigabatch.trainer.evaluation.metrics.score_rows import Rows, Scorer
    from gigabatch.trainer.evaluation.result import TaskResult

KS = (1, 5, 10, 100)
REPORTED = ("hit@1", "ndcg@10", "mrr", "map", "r_precision", "rank", *(f"recall@{k}" for k in KS))


@register
class TextRetrieval(SetTask):
    """Retrieval of documents by the text tower, and by TF-IDF as a baseline.

    --on is a JSONL file or a folder in the BEIR layout.
    """

    name = "text-retrieval"
    summary = (
        "queries retrieve documents, compared with TF-IDF; --on is a .jsonl file or a BEIR folder"
    )

    split: str = "test"
    """Split of a BEIR folder: reads qrels/SPLIT.tsv."""
    query_prefix: str = ""
    """Text before each query, such as `query: `."""
    document_prefix: str = ""
    """Text before each document."""
    tap: Literal["head", "tokens"] | None = None
    """head: one vector per text; tokens: late interaction. Default: tokens if the objective reads
    the tokens of text, but not its vectors."""

    def measure(self, context: EvalContext) -> TaskResult:
        """Rank all documents for every query, by the text tower and by TF-IDF."""
        from gigabatch.data.text.corpora import open_collection
        from gigabatch.trainer.evaluation.metrics.lexical import tfidf_rows
        from gigabatch.trainer.evaluation.metrics.score_rows import score_rows
        from gigabatch.trainer.evaluation.result import TaskResult

        collection = open_collection(Path(context.set_argument), self.split)
        queries, documents = self._embed(context, collection)
        device = queries.values.device
        relevance = _relevance(collection).to(device)
        lexical = tfidf_rows(collection.queries, collection.documents)
        scorers: dict[str, Scorer] = {
            "": score_rows(queries, documents),
            "tfidf_": lambda part: lexical(part).to(device),
        }
        values = {
            prefix + name: column
            for prefix, score in scorers.items()
            for name, column in _rank_share(context, score, relevance, collection).items()
        }
        metrics = {
            "documents": float(len(collection.documents)),
            "queries": float(len(collection.queries)),
        }
        if collection.triples:
            metrics["order_accuracy"] = _order_accuracy(queries, documents, collection.triples)
        return TaskResult(collection.name, values, set_metrics=metrics)

    def _embed(self, context: EvalContext, collection: RetrievalCollection) -> tuple[Rows, Rows]:
        """Embed all queries and documents, on every rank."""
        from gigabatch.trainer.evaluation.comparisons import choose_output
        from gigabatch.trainer.evaluation.embedding import embed_texts
        from gigabatch.trainer.evaluation.taps import comparison_reader

        config, run, world = context.config, context.run, context.world
        embed = comparison_reader(context.towers, choose_output(config, ["text"], self.tap))
        queries = [self.query_prefix + text for text in collection.queries]
        documents = [self.document_prefix + text for text in collection.documents]
        query_rows, document_rows = (
            embed_texts(embed, texts, config, run, world).gathered(world.group)
            for texts in (queries, documents)
        )
        return query_rows, document_rows


def _relevance(collection: RetrievalCollection) -> Relevance:
    import torch

    from gigabatch.trainer.evaluation.metrics.ranking import Relevance

    rows, keys, grades = zip(*collection.judgments, strict=True)
    return Relevance.by_pairs(
        torch.tensor(rows),
        torch.tensor(keys),
        torch.tensor(grades, dtype=torch.float64),
        len(collection.queries),
        torch.tensor(collection.own_documents),
    )


def _rank_share(
    context: EvalContext, score: Scorer, relevance: Relevance, collection: RetrievalCollection
) -> dict[str, Tensor]:
    """Rank this rank's share of the queries; return the values of all, float64 [N]."""
    from gigabatch.kernels import gather_rows
    from gigabatch.trainer.evaluation.metrics.ranking import rank_queries

    world, total = context.world, len(collection.queries)
    # Shares are contiguous, so the gathered values are in the order of the queries.
    first, last = (total * rank // world.size for rank in (world.rank, world.rank + 1))

    def score_share(part: slice) -> Tensor:
        return score(slice(part.start + first, part.stop + first))

    ranked = rank_queries(
        score_share, relevance.part(slice(first, last)), len(collection.documents), KS
    )
    return {name: gather_rows(ranked[name], world.group) for name in REPORTED}


def _order_accuracy(
    queries: Rows, documents: Rows, triples: Sequence[tuple[int, int, Sequence[int]]]
) -> float:
    """Return the share of (anchor, positive) that score above all negatives of their line."""
    import torch

    from gigabatch.trainer.evaluation.metrics.score_rows import score_rows
    from gigabatch.trainer.evaluation.metrics.statistics import order_accuracy

    correct = []
    for query, positive, negatives in triples:
        score = score_rows(queries.take([query]), documents.take([positive, *negatives]))
        scores = score(slice(0, 1))
        correct.append(order_accuracy(scores[0, :1], scores[:, 1:]))
    return float(torch.cat(correct).mean())
