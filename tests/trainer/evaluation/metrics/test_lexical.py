from __future__ import annotations

import math

import numpy as np
import pytest

from gigabatch.trainer.evaluation.metrics.lexical import TfIdf, tfidf_rows, words_of

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "fast", "slow", "Über-cat", "3d"]


def dense(queries: list[str], documents: list[str]) -> np.ndarray:
    """Compute the full score matrix from the formula."""
    vocabulary = sorted({w for d in documents for w in words_of(d)})
    frequency = {w: sum(w in words_of(d) for d in documents) for w in vocabulary}
    idf = np.array([math.log((1 + len(documents)) / (1 + frequency[w])) + 1 for w in vocabulary])

    def rows(texts: list[str]) -> np.ndarray:
        out = np.array([[words_of(t).count(w) for w in vocabulary] for t in texts]) * idf
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-300)

    return rows(queries) @ rows(documents).T


@pytest.mark.parametrize("seed", range(5))
def test_scores_match_dense_matrices(seed: int) -> None:
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, random.integers(0, 9))) for _ in range(30)]
    queries, documents = [*texts[:10], "nothing known here"], texts[10:]
    score = tfidf_rows(queries, documents)
    np.testing.assert_allclose(score(slice(2, 11)), dense(queries, documents)[2:], atol=1e-6)


def test_words_are_letters_and_digits_of_any_script() -> None:
    assert words_of("Größe_3D: état-major, 猫!") == ["größe", "3d", "état", "major", "猫"]
    assert TfIdf(["", "..."]).scores("a").tolist() == [0.0, 0.0]
