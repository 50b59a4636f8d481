from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.linear_fit import choose_l2, held_out
from gigabatch.trainer.evaluation.metrics.ridge_probe import (
    RIDGE_L2_GRID,
    fit_ridge,
    regression_probe,
    squared_error,
    summarize_regression,
)

SINGLE = World(0, 1, torch.device("cpu"), None)
FIT = partial(fit_ridge, world=SINGLE)


def case(rows: int, width: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Return features [rows, width] and labels that are linear in them, with noise."""
    random = np.random.default_rng(5)
    x = random.normal(2, 3, (rows, width)).astype(np.float32).astype(np.float64)
    return x, 7 + x[:, :3] @ [1.0, -2.0, 0.5] + random.normal(0, noise, rows)


def standardized(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Standardize `x` by the mean and standard deviation of `by`."""
    scale = np.where(by.std(0) > 1e-9, by.std(0), 1.0)
    return (x - by.mean(0)) / scale


def least_squares(x: np.ndarray, y: np.ndarray, l2: float) -> np.ndarray:
    """Minimize mean (y - mean y - x w)^2 + l2 |w|^2 as least squares with added rows."""
    width = x.shape[1]
    rows = np.vstack([x / np.sqrt(len(x)), np.sqrt(l2) * np.eye(width)])
    targets = np.concatenate([(y - y.mean()) / np.sqrt(len(x)), np.zeros(width)])
    return np.linalg.lstsq(rows, targets, rcond=None)[0]


def tensors(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(x).float(), torch.from_numpy(y)


@pytest.mark.parametrize(("rows", "width"), [(80, 6), (20, 50)])
def test_ridge_fit_matches_least_squares(rows: int, width: int) -> None:
    x, y = case(rows, width, 1.0)
    x[:, 4] = 3.0  # a constant feature explains no variance
    grid = (10.0, 1.0, 1e-3, 1e-5)
    models = fit_ridge(*tensors(x, y), grid, SINGLE)
    for l2, model in zip(grid, models, strict=True):
        expected = least_squares(standardized(x, x), y, l2)
        np.testing.assert_allclose(model.weight.numpy(), expected, rtol=1e-7, atol=1e-8)
        predicted = standardized(x, x) @ expected + y.mean()
        np.testing.assert_allclose(model.predict(tensors(x, y)[0]).numpy(), predicted, rtol=1e-7)


def test_choose_l2_takes_the_least_error_on_held_out_rows() -> None:
    x, y = case(40, 30, 4.0)
    out = held_out(len(x), SINGLE, 3, 0.2).numpy()
    errors = {}
    for l2 in (1e3, 10.0, 1e-1, 1e-3):
        w = least_squares(standardized(x[~out], x[~out]), y[~out], l2)
        residual = standardized(x[out], x[~out]) @ w + y[~out].mean() - y[out]
        errors[l2] = np.square(residual).sum()
    best = min(errors, key=errors.__getitem__)
    assert best in (10.0, 1e-1)  # inside the grid, so the choice matters
    assert choose_l2(*tensors(x, y), SINGLE, 3, tuple(errors), FIT, squared_error) == best


def test_choose_l2_takes_the_largest_of_equals() -> None:
    x, _ = case(40, 3, 0.0)
    sample = tensors(x, np.full(40, 3.0))
    assert choose_l2(*sample, SINGLE, 0, RIDGE_L2_GRID, FIT, squared_error) == 1e3


def test_regression_probe_predicts_linear_labels_of_unseen_samples() -> None:
    x, y = case(300, 8, 0.1)
    values, l2 = regression_probe(
        tensors(x[:200], y[:200]), tensors(x[200:], y[200:]), SINGLE, seed=1
    )
    assert l2 <= 1e-3
    residual = values["predicted"].numpy() - y[200:]
    metrics = summarize_regression(values)
    assert metrics["mae"] == pytest.approx(np.abs(residual).mean())
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.square(residual).mean()))
    assert metrics["r2"] == pytest.approx(1 - np.square(residual).mean() / y[200:].var())
    assert 0.07 < metrics["rmse"] < 0.14


def test_r2_of_equal_labels_is_one_or_zero() -> None:
    true = torch.full((3,), 2.0, dtype=torch.float64)
    assert summarize_regression({"true": true, "predicted": true})["r2"] == 1
    assert summarize_regression({"true": true, "predicted": true + 1})["r2"] == 0


def test_fit_ridge_rejects_no_rows_and_infinite_features() -> None:
    x, y = tensors(*case(10, 3, 0.1))
    with pytest.raises(GigabatchError, match="there are none"):
        fit_ridge(x[:0], y[:0], [1.0], SINGLE)
    x[3, 1] = torch.inf
    with pytest.raises(GigabatchError, match="finite"):
        fit_ridge(x, y, [1.0], SINGLE)
