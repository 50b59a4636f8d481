from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.classification import (
    class_vectors,
    nearest_neighbors,
    summarize_classification,
    zero_shot,
)

SINGLE = World(0, 1, torch.device("cpu"), None)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_zero_shot_matches_numpy_prompt_averages() -> None:
    random = np.random.default_rng(3)
    prompts, images = random.normal(size=(12, 4)), random.normal(size=(50, 4))
    labels = random.integers(0, 4, 50)
    classes = unit(unit(prompts).reshape(4, 3, 4).mean(1))
    vectors = class_vectors(torch.from_numpy(prompts).float(), templates=3)
    np.testing.assert_allclose(vectors.numpy(), classes, atol=1e-6)
    values = zero_shot(torch.from_numpy(images).float(), torch.from_numpy(labels), vectors, SINGLE)
    correct = (images @ classes.T).argmax(1) == labels
    assert values["top1"].tolist() == correct.tolist()
    assert values["top5"].tolist() == [1.0] * 50
    metrics = summarize_classification(values)
    accuracies = [correct[labels == c].mean() for c in range(4)]
    assert metrics["class_top1"] == pytest.approx(np.mean(accuracies))


def test_zero_shot_counts_tied_classes_as_wrong() -> None:
    classes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    values = zero_shot(classes, torch.arange(3), classes, SINGLE)
    assert values["top1"].tolist() == [0, 0, 1]
    assert values["top5"].tolist() == [1, 1, 1]


@given(
    seed=st.integers(0, 10**6), k=st.integers(1, 12), leave=st.booleans(), spread=st.integers(1, 4)
)
def test_nearest_neighbors_match_votes_in_numpy(
    seed: int, k: int, leave: bool, spread: int
) -> None:
    random = np.random.default_rng(seed)
    # Points of a square grid share directions, so neighbors tie.
    bank = random.integers(1, spread + 1, (15, 2)).astype(np.float32)
    bank_labels = random.integers(0, 4, 15)
    queries = bank if leave else random.integers(1, spread + 1, (9, 2)).astype(np.float32)
    labels = bank_labels if leave else random.integers(0, 5, 9)
    values = nearest_neighbors(
        *map(torch.from_numpy, (queries, labels, bank, bank_labels)), SINGLE, k, 0.1, leave
    )
    scores = (unit(queries.astype(np.float64)) @ unit(bank.astype(np.float64)).T).round(9)
    for i, row in enumerate(scores):
        order = [j for j in np.argsort(-row, kind="stable") if not (leave and i == j)][:k]
        votes = {int(c): 0.0 for c in bank_labels}
        for j in order:
            votes[int(bank_labels[j])] += float(np.exp(row[j] / 0.1))
        correct = votes.get(int(labels[i]), 0.0)
        # Sums in another order differ in the last bits, so ties are compared up to those.
        before = sum(v >= correct * (1 - 1e-9) for c, v in votes.items() if c != labels[i])
        assert values["top1"][i] == float(correct > 0 and before < 1)
        assert values["top5"][i] == float(correct > 0 and before < 5)
