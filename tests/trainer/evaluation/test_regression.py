from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.indexing import open_index
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.labels import flags_of, numbers_of
from gigabatch.trainer.evaluation.probe import held_out
from gigabatch.trainer.evaluation.regression import (
    choose_l2,
    fit_ridge,
    regression_probe,
    regression_summary,
)

ALONE = World(0, 1, torch.device("cpu"), None)


def case(rows: int, width: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    x = random.normal(2, 3, (rows, width)).astype(np.float32).astype(np.float64)
    return x, 7 + x[:, :3] @ [1.0, -2.0, 0.5] + random.normal(0, noise, rows)


def standard(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    scale = np.where(by.std(0) > 1e-9, by.std(0), 1.0)
    return (x - by.mean(0)) / scale


def least_squares(x: np.ndarray, y: np.ndarray, l2: float) -> np.ndarray:
    """w of mean (y - mean y - x w)^2 + l2 |w|^2, as plain least squares of rows that were added."""
    width = x.shape[1]
    rows = np.vstack([x / np.sqrt(len(x)), np.sqrt(l2) * np.eye(width)])
    right = np.concatenate([(y - y.mean()) / np.sqrt(len(x)), np.zeros(width)])
    return np.linalg.lstsq(rows, right, rcond=None)[0]


def tensors(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(x).float(), torch.from_numpy(y)


@pytest.mark.parametrize(("rows", "width"), [(80, 6), (20, 50)])
def test_ridge_is_least_squares_of_rows_added(rows: int, width: int) -> None:
    x, y = case(rows, width, 1.0)
    x[:, 4] = 3.0  # constant: it explains nothing
    grid = (10.0, 1.0, 1e-3, 1e-5)
    found = fit_ridge(*tensors(x, y), grid, ALONE)
    for l2, probe in zip(grid, found, strict=True):
        wanted = least_squares(standard(x, x), y, l2)
        np.testing.assert_allclose(probe.weight.numpy(), wanted, rtol=1e-7, atol=1e-8)
        predicted = standard(x, x) @ wanted + y.mean()
        np.testing.assert_allclose(probe.predict(tensors(x, y)[0]).numpy(), predicted, rtol=1e-7)


def test_l2_is_what_errs_least_on_the_held_out_part() -> None:
    x, y = case(40, 30, 4.0)
    out = held_out(len(x), ALONE, 3, 0.2).numpy()
    errors = {}
    for l2 in (1e3, 10.0, 1e-1, 1e-3):
        w = least_squares(standard(x[~out], x[~out]), y[~out], l2)
        missed = standard(x[out], x[~out]) @ w + y[~out].mean() - y[out]
        errors[l2] = np.square(missed).sum()
    best = min(errors, key=errors.__getitem__)
    assert best in (10.0, 1e-1)  # neither end: the choice decides something
    assert choose_l2(*tensors(x, y), ALONE, 3, tuple(errors)) == best


def test_the_largest_of_equal_l2_is_taken() -> None:
    x, _ = case(40, 3, 0.0)
    assert choose_l2(*tensors(x, np.full(40, 3.0)), ALONE, 0) == 1e3


def test_a_linear_label_is_met_on_samples_never_seen() -> None:
    x, y = case(300, 8, 0.1)
    figures, l2 = regression_probe(
        tensors(x[:200], y[:200]), tensors(x[200:], y[200:]), ALONE, seed=1
    )
    assert l2 <= 1e-3
    missed = figures["predicted"].numpy() - y[200:]
    told = regression_summary(figures)
    assert told["mae"] == pytest.approx(np.abs(missed).mean())
    assert told["rmse"] == pytest.approx(np.sqrt(np.square(missed).mean()))
    assert told["r2"] == pytest.approx(1 - np.square(missed).mean() / y[200:].var())
    assert 0.07 < told["rmse"] < 0.14


def test_r2_of_labels_that_are_all_one() -> None:
    true = torch.full((3,), 2.0, dtype=torch.float64)
    assert regression_summary({"true": true, "predicted": true})["r2"] == 1
    assert regression_summary({"true": true, "predicted": true + 1})["r2"] == 0


def test_what_cannot_be_fitted_is_refused() -> None:
    x, y = tensors(*case(10, 3, 0.1))
    with pytest.raises(GigabatchError, match="there are none"):
        fit_ridge(x[:0], y[:0], [1.0], ALONE)
    x[3, 1] = torch.inf
    with pytest.raises(GigabatchError, match="finite"):
        fit_ridge(x, y, [1.0], ALONE)


def test_labels_must_be_numbers_and_flags_yes_or_no(shards: Path) -> None:
    index = open_index(shards / "val")
    assert numbers_of([1, 2.5], "age", index).tolist() == [1, 2.5]
    wrong: Any
    for wrong in ("3", True, None, float("nan"), 10**400, [1]):
        with pytest.raises(GigabatchError, match=r"s00001.*'age' of its json member is no number"):
            numbers_of([1, wrong], "age", index)
    assert flags_of([True, 0, 1.0, False], "clean", index).tolist() == [True, False, True, False]
    for wrong in ("1", 2, None, float("nan")):
        with pytest.raises(GigabatchError, match=r"s00001.*'clean' .* neither true nor false"):
            flags_of([1, wrong], "clean", index)
