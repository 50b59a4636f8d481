from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sharded_metrics import case
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics import newton
from gigabatch.trainer.evaluation.metrics.linear_fit import choose_l2, held_out
from gigabatch.trainer.evaluation.metrics.linear_probe import (
    count_errors,
    fit_logistic,
    linear_probe,
)

SINGLE = World(0, 1, torch.device("cpu"), None)


def dense_newton(x: np.ndarray, y: np.ndarray, l2: float, steps: int = 60) -> np.ndarray:
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
    expected = dense_newton(standardized, y, l2)
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


def sequence(seed: int, count: int) -> np.ndarray:
    """Return numbers of about unit variance from a linear congruential generator, float64 [n].

    The values below were computed from the same numbers, in any version of numpy.
    """
    state, out = seed, np.empty(count)
    for i in range(count):
        total = 0.0
        for _ in range(4):
            state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            total += (state >> 33) / 2**31
        out[i] = (total - 2) * 1.7320508
    return out


def correlated_case(seed: int, n: int, d: int, c: int, noise: float) -> tuple[Tensor, Tensor]:
    """Return features [n, d], of which half are nearly multiples of the others, and classes."""
    numbers = sequence(seed, c * d + n * d)
    y = np.arange(n) * 7 % c
    x = numbers[: c * d].reshape(c, d)[y] + noise * numbers[c * d :].reshape(n, d)
    x[:, d // 2 :] += 3 * x[:, : d - d // 2]
    return torch.from_numpy(x), torch.from_numpy(y)


# LogisticRegression(C=1 / (l2 * n), tol=1e-12, max_iter=100000) of scikit-learn 1.9.1 with scipy
# 1.17.1: mean cross-entropy, sum of absolute weights, first weights of the last class, accuracy.
SCIKIT_LEARN = [
    ((1, 120, 6, 3, 2.0), 1.0, 0.9575253834293785, 1.172356433758847,
     [-0.10203173, 0.02946654, 0.02102754], 72 / 120),
    ((1, 120, 6, 3, 2.0), 1e-2, 0.7611673472332908, 9.646032805388014,
     [-0.91647081, 0.39409256, 0.04064353], 80 / 120),
    ((1, 120, 6, 3, 2.0), 1e-5, 0.7271969266622982, 20.113454732305755,
     [-1.62577824, 0.65936173, -0.07733632], 81 / 120),
    ((2, 200, 10, 5, 1.0), 1.0, 1.1386140653857721, 3.452859690015868,
     [0.02405788, 0.02733042, 0.04195995], 154 / 200),
    ((2, 200, 10, 5, 1.0), 1e-2, 0.28635690733815805, 30.627977556691256,
     [0.20855584, -0.30776922, 1.22485632], 190 / 200),
    ((2, 200, 10, 5, 1.0), 1e-5, 0.007031981986480854, 278.77965109755723,
     [-2.9252284, -2.11537515, 11.05272324], 200 / 200),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "l2", "loss", "size", "weights", "accuracy"), SCIKIT_LEARN)
def test_logistic_fit_matches_scikit_learn(
    shape: tuple[int, int, int, int, float],
    l2: float,
    loss: float,
    size: float,
    weights: list[float],
    accuracy: float,
) -> None:
    x, y = correlated_case(*shape)
    penalties = [100 * l2, l2]  # the second fit starts from the first
    model = fit_logistic(x, y, penalties, shape[3], SINGLE)[1]
    logits = model.logits(x)
    assert float(torch.nn.functional.cross_entropy(logits, y)) == pytest.approx(loss, rel=2e-5)
    assert float(model.weight.abs().sum()) == pytest.approx(size, rel=2e-5)
    assert model.weight[-1, :3].tolist() == pytest.approx(weights, rel=1e-4, abs=1e-5)
    assert float((logits.argmax(1) == y).double().mean()) == accuracy


def test_logistic_fit_of_a_large_correlated_set_is_at_the_minimum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4,000 x 64 in six penalties: about a second; a first-order method took minutes."""
    random = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (4000,), generator=random)
    base, noise = (torch.randn(n, 64, generator=random) for n in (5, 4000))
    mix = torch.randn(64, 64, generator=random) * torch.logspace(0, -5, 64).unsqueeze(1)
    x = ((0.1 * base[y] + noise) @ mix).double()
    models = fit_logistic(x, y, [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5], 5, SINGLE)
    weight = models[-1].weight.clone().requires_grad_()
    logits = models[-1].standardize(x) @ weight.T + models[-1].bias
    loss = torch.nn.functional.cross_entropy(logits, y) + 1e-5 / 2 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, [weight])
    assert float(gradient.abs().max()) < 1e-6
    # Rows and probabilities that do not fit in memory are computed again in every pass.
    monkeypatch.setattr(newton, "_CACHED_VALUES", 0)
    (again,) = fit_logistic(x[:500], y[:500], [1e-3], 5, SINGLE)
    monkeypatch.undo()
    (cached,) = fit_logistic(x[:500], y[:500], [1e-3], 5, SINGLE)
    torch.testing.assert_close(again.weight, cached.weight, rtol=1e-9, atol=1e-9)
