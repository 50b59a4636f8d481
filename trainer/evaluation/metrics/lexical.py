"""TF-IDF with cosine similarity: the lexical baseline of text retrieval.

Words are runs of letters and digits in lower case. A word's weight is its count times
log((1 + n) / (1 + df)) + 1, with n documents of which df contain the word. Rows have unit length.
This is the smoothed form that scikit-learn uses by default. Query words that no document contains
are ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gigabatch.trainer.evaluation.metrics.score_rows import Scorer
from gigabatch.trainer.evaluation.progress import tracked

_WORD = re.compile(r"[^\W_]+")


class TfIdf:
    """An inverted index of documents; memory O(words)."""

    def __init__(self, documents: Sequence[str]) -> None:
        self.size = len(documents)
        self.columns: dict[str, int] = {}
        rows, columns, counts = [], [], []
        for row, text in enumerate(tracked("indexing documents", documents, len(documents))):
            for word, count in Counter(words_of(text)).items():
                rows.append(row)
                columns.append(self.columns.setdefault(word, len(self.columns)))
                counts.append(count)
        row_of, column_of = np.array(rows, np.int64), np.array(columns, np.int64)
        frequency = np.bincount(column_of, minlength=len(self.columns))
        self.idf = np.log((1 + self.size) / (1 + frequency)) + 1
        weight = np.array(counts, np.float64) * self.idf[column_of]
        norms = np.sqrt(np.bincount(row_of, weight**2, minlength=self.size))
        order = np.argsort(column_of, kind="stable")
        self.row, self.weight = row_of[order], (weight / norms[row_of])[order]
        self.start = np.concatenate([[0], np.cumsum(frequency)]).astype(np.int64)

    def scores(self, query: str) -> np.ndarray:
        """Return the cosine of a query with every document, float64 [documents]."""
        counts = Counter(word for word in words_of(query) if word in self.columns)
        # The words are sorted so that equal bags of words are summed in one order and tie exactly.
        weights = {
            self.columns[word]: n * self.idf[self.columns[word]]
            for word, n in sorted(counts.items())
        }
        norm = np.sqrt(sum(weight**2 for weight in weights.values()))
        scores = np.zeros(self.size)
        for column, weight in weights.items():
            part = slice(self.start[column], self.start[column + 1])
            scores[self.row[part]] += self.weight[part] * (weight / norm)
        return scores


def words_of(text: str) -> list[str]:
    """Return the runs of letters and digits in lower case."""
    return _WORD.findall(text.lower())


def tfidf_rows(queries: Sequence[str], documents: Sequence[str]) -> Scorer:
    """Return the scorer of `queries` against all `documents`."""
    index = TfIdf(documents)

    def rows(part: slice) -> Tensor:
        block = np.empty((part.stop - part.start, len(documents)), np.float32)
        for row, query in enumerate(queries[part]):
            block[row] = index.scores(query)
        return torch.from_numpy(block)

    return rows
