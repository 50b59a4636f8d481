"""A lexical baseline: TF-IDF and cosine, which every figure of text retrieval stands beside.

Words are runs of letters and digits, lower-cased. A word's weight is its count times log((1 + n) /
(1 + df)) + 1, n the documents and df those that hold it; rows have unit length (the smoothed form
that scikit-learn uses by default). Words that no document holds count in no query.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gigabatch.trainer.evaluation.score_rows import Scorer

_WORD = re.compile(r"[^\W_]+")


class TfIdf:
    """An inverted index of `documents`: O(words) memory."""

    def __init__(self, documents: Sequence[str]) -> None:
        self.size = len(documents)
        self.words: dict[str, int] = {}
        rows, columns, counts = [], [], []
        for row, text in enumerate(documents):
            for word, count in Counter(words_of(text)).items():
                rows.append(row)
                columns.append(self.words.setdefault(word, len(self.words)))
                counts.append(count)
        owner, column = np.array(rows, np.int64), np.array(columns, np.int64)
        held = np.bincount(column, minlength=len(self.words))
        self.idf = np.log((1 + self.size) / (1 + held)) + 1
        weight = np.array(counts, np.float64) * self.idf[column]
        norms = np.sqrt(np.bincount(owner, weight**2, minlength=self.size))
        order = np.argsort(column, kind="stable")
        self.row, self.weight = owner[order], (weight / norms[owner])[order]
        self.start = np.concatenate([[0], np.cumsum(held)]).astype(np.int64)

    def row_of(self, query: str) -> np.ndarray:
        """float64 [documents]: cosine with each of them."""
        known = Counter(word for word in words_of(query) if word in self.words)
        weights = {self.words[w]: n * self.idf[self.words[w]] for w, n in sorted(known.items())}
        norm = np.sqrt(sum(weight**2 for weight in weights.values()))
        scores = np.zeros(self.size)
        for column, weight in weights.items():
            part = slice(self.start[column], self.start[column + 1])
            scores[self.row[part]] += self.weight[part] * (weight / norm)
        return scores


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, lower-cased."""
    return _WORD.findall(text.lower())


def tfidf_rows(queries: Sequence[str], documents: Sequence[str]) -> Scorer:
    """Scores of `queries` with all `documents`."""
    index = TfIdf(documents)

    def rows(part: slice) -> Tensor:
        found = np.empty((part.stop - part.start, len(documents)), np.float32)
        for place, query in enumerate(queries[part]):
            found[place] = index.row_of(query)
        return torch.from_numpy(found)

    return rows
