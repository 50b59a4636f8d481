from __future__ import annotations

import numpy as np
import pytest
import torch
from figures_of_ranks import case
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.classify import (
    class_vectors,
    classification_summary,
    nearest_neighbours,
    zero_shot,
)
from gigabatch.trainer.evaluation.probe import choose_l2, fit_probe, held_out, linear_probe

ALONE = World(0, 1, torch.device("cpu"), None)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_zero_shot_equals_prompts_averaged_by_hand() -> None:
    random = np.random.default_rng(3)
    prompts, images = random.normal(size=(12, 4)), random.normal(size=(50, 4))
    labels = random.integers(0, 4, 50)
    classes = unit(unit(prompts).reshape(4, 3, 4).mean(1))
    found_classes = class_vectors(torch.from_numpy(prompts).float(), templates=3)
    np.testing.assert_allclose(found_classes.numpy(), classes, atol=1e-6)
    found = zero_shot(
        torch.from_numpy(images).float(), torch.from_numpy(labels), found_classes, ALONE
    )
    right = (images @ classes.T).argmax(1) == labels
    assert found["top1"].tolist() == right.tolist()
    assert found["top5"].tolist() == [1.0] * 50
    told = classification_summary(found)
    each = [right[labels == c].mean() for c in range(4)]
    assert told["class_top1"] == pytest.approx(np.mean(each))


def test_two_classes_alike_are_never_right() -> None:
    classes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = zero_shot(classes, torch.arange(3), classes, ALONE)
    assert found["top1"].tolist() == [0, 0, 1]
    assert found["top5"].tolist() == [1, 1, 1]


@given(
    seed=st.integers(0, 10**6), k=st.integers(1, 12), leave=st.booleans(), spread=st.integers(1, 4)
)
def test_neighbours_vote_as_counted_by_hand(seed: int, k: int, leave: bool, spread: int) -> None:
    random = np.random.default_rng(seed)
    # Directions of a square grid: many of them are the same, so that neighbours tie.
    bank = random.integers(1, spread + 1, (15, 2)).astype(np.float32)
    bank_labels = random.integers(0, 4, 15)
    queries = bank if leave else random.integers(1, spread + 1, (9, 2)).astype(np.float32)
    labels = bank_labels if leave else random.integers(0, 5, 9)
    found = nearest_neighbours(
        *map(torch.from_numpy, (queries, labels, bank, bank_labels)), ALONE, k, 0.1, leave
    )
    scores = (unit(queries.astype(np.float64)) @ unit(bank.astype(np.float64)).T).round(9)
    for i, row in enumerate(scores):
        order = [j for j in np.argsort(-row, kind="stable") if not (leave and i == j)][:k]
        votes = {int(c): 0.0 for c in bank_labels}
        for j in order:
            votes[int(bank_labels[j])] += float(np.exp(row[j] / 0.1))
        own = votes.get(int(labels[i]), 0.0)
        # Sums in another order differ in the last bits: a tie is one up to those.
        before = sum(v >= own * (1 - 1e-9) for c, v in votes.items() if c != labels[i])
        assert found["top1"][i] == float(own > 0 and before < 1)
        assert found["top5"][i] == float(own > 0 and before < 5)


def newton(x: np.ndarray, y: np.ndarray, l2: float, steps: int = 60) -> np.ndarray:
    """[C, D + 1] by Newton's method on the whole Hessian, the bias unpenalised."""
    classes, rows = int(y.max()) + 1, np.hstack([x, np.ones((len(x), 1))])
    width = rows.shape[1]
    penalty = np.tile(np.r_[np.full(width - 1, l2), 0.0], classes)
    w = np.zeros(classes * width)
    for _ in range(steps):
        logits = rows @ w.reshape(classes, width).T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        grad = ((p - np.eye(classes)[y]).T @ rows).ravel() / len(x) + penalty * w
        blocks = [
            [(rows * (p[:, a] * ((a == b) - p[:, b]))[:, None]).T @ rows for b in range(classes)]
            for a in range(classes)
        ]
        w -= np.linalg.pinv(np.block(blocks) / len(x) + np.diag(penalty)) @ grad
    return w.reshape(classes, width)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_a_probe_is_the_minimum_that_newton_finds(l2: float) -> None:
    held = case()
    x, y = held["image"].double().numpy(), held["label"].numpy()
    probe = fit_probe(held["image"], held["label"], 5, l2, ALONE)
    standard = (x - x.mean(0)) / x.std(0)
    wanted = newton(standard, y, l2)
    np.testing.assert_allclose(probe.weight.numpy(), wanted[:, :-1], rtol=1e-4, atol=1e-4)
    logits = standard @ wanted[:, :-1].T + wanted[:, -1]
    logits -= logits.mean(1, keepdims=True)  # a constant for all classes changes nothing
    found = probe.logits(held["image"]).numpy()
    np.testing.assert_allclose(found - found.mean(1, keepdims=True), logits, rtol=1e-4, atol=1e-4)


def test_l2_is_what_does_best_on_the_held_out_part() -> None:
    held = case()
    x, y = held["image"], held["label"]
    out = held_out(len(x), ALONE, 9, 0.2)
    assert 3 <= int(out.sum()) <= 25
    shares = {}
    for l2 in (100.0, 1e-2, 1e-4):
        probe = fit_probe(x[~out], y[~out], 5, l2, ALONE)
        shares[l2] = float((probe.logits(x[out]).argmax(1) == y[out]).double().mean())
    best = max(shares, key=lambda l2: (shares[l2], l2))
    assert choose_l2(x, y, 5, ALONE, 9, (100.0, 1e-2, 1e-4)) == best


def test_a_probe_learns_what_is_linear_and_is_wrong_on_classes_it_never_saw() -> None:
    random = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (300,), generator=random) * 7 - 5
    x = torch.randn(300, 8, generator=random) * 0.1 + torch.nn.functional.one_hot((y + 5) // 7, 8)
    x[:, 7] = 4.0  # constant
    strange = y[200:].clone()
    strange[:10] = 99
    figures, l2 = linear_probe((x[:200], y[:200]), (x[200:], strange), ALONE, seed=0)
    assert l2 in (1.0, 1e-1, 1e-2)
    assert figures["top1"].tolist() == [0.0] * 10 + [1.0] * 90
    assert figures["label"].tolist() == strange.tolist()
    x[0, 0] = torch.nan
    with pytest.raises(GigabatchError, match="finite"):
        fit_probe(x, (y + 5) // 7, 3, 1e-3, ALONE)
