from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sharded_metrics import case

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.linear_fit import choose_l2, held_out
from gigabatch.trainer.evaluation.metrics.linear_probe import (
    count_errors,
    fit_logistic,
    linear_probe,
)

SINGLE = World(0, 1, torch.device("cpu"), None)


def newton(x: np.ndarray, y: np.ndarray, l2: float, steps: int = 60) -> np.ndarray:
    """Return weights and unpenalized biases [C, D + 1] by Newton's method, full Hessian."""
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
def test_logistic_fit_matches_newton(l2: float) -> None:
    rows = case()
    x, y = rows["image"].double().numpy(), rows["label"].numpy()
    (model,) = fit_logistic(rows["image"], rows["label"], [l2], 5, SINGLE)
    standardized = (x - x.mean(0)) / x.std(0)
    expected = newton(standardized, y, l2)
    np.testing.assert_allclose(model.weight.numpy(), expected[:, :-1], rtol=1e-4, atol=1e-4)
    logits = standardized @ expected[:, :-1].T + expected[:, -1]
    logits -= logits.mean(1, keepdims=True)  # logits are defined up to a constant per row
    actual = model.logits(rows["image"]).numpy()
    actual -= actual.mean(1, keepdims=True)
    np.testing.assert_allclose(actual, logits, rtol=1e-4, atol=1e-4)


def test_choose_l2_takes_the_most_accurate_on_held_out_rows() -> None:
    rows = case()
    x, y = rows["image"], rows["label"]
    out = held_out(len(x), SINGLE, 9, 0.2)
    assert 3 <= int(out.sum()) <= 25
    accuracies = {}
    for l2 in (100.0, 1e-2, 1e-4):
        (model,) = fit_logistic(x[~out], y[~out], [l2], 5, SINGLE)
        accuracies[l2] = float((model.logits(x[out]).argmax(1) == y[out]).double().mean())
    best = max(accuracies, key=lambda l2: (accuracies[l2], l2))
    fit = partial(fit_logistic, classes=5, world=SINGLE)
    assert choose_l2(x, y, SINGLE, 9, tuple(accuracies), fit, count_errors) == best


def test_linear_probe_learns_linear_classes_and_fails_on_unknown_ones() -> None:
    random = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (300,), generator=random) * 7 - 5
    x = torch.randn(300, 8, generator=random) * 0.1 + torch.nn.functional.one_hot((y + 5) // 7, 8)
    x[:, 7] = 4.0  # constant
    test_y = y[200:].clone()
    test_y[:10] = 99
    values, l2 = linear_probe((x[:200], y[:200]), (x[200:], test_y), SINGLE, seed=0)
    assert l2 in (1.0, 1e-1, 1e-2)
    assert values["top1"].tolist() == [0.0] * 10 + [1.0] * 90
    assert values["label"].tolist() == test_y.tolist()
    x[0, 0] = torch.nan
    with pytest.raises(GigabatchError, match="finite"):
        fit_logistic(x, (y + 5) // 7, [1e-3], 3, SINGLE)
