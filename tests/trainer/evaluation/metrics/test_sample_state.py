from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from gigabatch.trainer.evaluation.metrics.sample_state import (
    group_by_value,
    summarize_distribution,
)
from gigabatch.trainer.evaluation.metrics.statistics import MAX_SLICES
from gigabatch.trainer.objectives import Objective, build_objective, parse_settings

LOW = -math.inf


def objective(name: str, **settings: Any) -> Objective[Any]:
    return build_objective(parse_settings({"name": name, **settings}))


def test_distribution_matches_sorted_values() -> None:
    values = np.random.default_rng(0).normal(size=101)
    metrics = summarize_distribution({"loss": torch.from_numpy(values)})
    ordered = np.sort(values)
    assert metrics == pytest.approx(
        {
            "loss/mean": values.mean(), "loss/min": ordered[0], "loss/max": ordered[-1],
            "loss/p05": ordered[5], "loss/p25": ordered[25], "loss/median": ordered[50],
            "loss/p75": ordered[75], "loss/p95": ordered[95],
        }
    )  # fmt: skip


def test_group_by_value_reports_means_and_correlation_with_log_frequency() -> None:
    random = np.random.default_rng(1)
    kinds = random.choice(["a", "b", "c", "d"], 200, p=[0.6, 0.2, 0.15, 0.05]).tolist()
    values = random.normal(size=200) + np.array([kind == "a" for kind in kinds])
    metrics = group_by_value({"tau": torch.from_numpy(values)}, kinds, "kind")
    assert metrics["kind/values"] == 4
    means, counts = [], []
    for kind in "abcd":
        kind_values = [v for v, k in zip(values, kinds, strict=True) if k == kind]
        assert metrics[f"kind={kind}/tau"] == pytest.approx(np.mean(kind_values))
        assert metrics[f"kind={kind}/count"] == len(kind_values)
        means.append(np.mean(kind_values))
        counts.append(np.log(len(kind_values)))
    m, c = np.array(means) - np.mean(means), np.array(counts) - np.mean(counts)
    expected = (m * c).sum() / np.sqrt((m * m).sum() * (c * c).sum())
    assert metrics["tau/log_frequency_correlation"] == pytest.approx(expected)


def test_group_by_value_omits_constant_correlations_and_long_lists() -> None:
    values = torch.arange(4.0, dtype=torch.float64)
    assert group_by_value({"tau": values}, [1, 1, 2, 2], "k").keys() == {
        "k/values", "k=1/count", "k=2/count", "k=1/tau", "k=2/tau",
    }  # fmt: skip
    many = torch.arange(MAX_SLICES + 2.0, dtype=torch.float64)
    kinds = [0, *range(MAX_SLICES + 1)]
    assert group_by_value({"tau": many}, kinds, "k").keys() == {
        "k/values", "tau/log_frequency_correlation",
    }  # fmt: skip


def test_sogclr_reports_estimates_and_temperatures_of_samples() -> None:
    rows = torch.tensor([[0.1, 0.3, 0.05, 0.07, 0, 0], [LOW, LOW, 0.5, 0.5, 0, 0]])
    state = objective("sogclr", temperatures="individual").sample_values({"state": rows})
    assert {name: value[0].item() for name, value in state.items()} == pytest.approx(
        {
            "image_log_u": 0.1, "text_log_u": 0.3, "log_u": 0.2,
            "image_temperature": 0.05, "text_temperature": 0.07, "temperature": 0.06,
        }
    )  # fmt: skip
    assert all(value[1].isnan() for value in state.values())  # not seen yet
    assert "temperature" not in objective("sogclr").sample_values({"state": rows[:, :2]})


def test_noisy_reports_losses_and_clean_probabilities_of_samples() -> None:
    losses = torch.tensor([[0.1], [3.0], [math.nan]])
    noisy = objective("noisy")
    assert noisy.sample_values({"loss": losses}).keys() == {"loss"}  # before the first split
    split = torch.tensor([[0.2, 0.1, 0.5], [2.5, 0.3, 0.5]])
    noisy.get_buffer("split").copy_(split)
    clean = noisy.sample_values({"loss": losses})["clean_probability"]
    density = [
        share * math.exp(-((0.2 - mean) ** 2) / 2 / variance) / math.sqrt(variance)
        for mean, variance, share in split.tolist()
    ]  # losses below the lower mean have the probability at that mean
    assert clean[0].item() == pytest.approx(density[0] / sum(density), rel=1e-5)
    assert clean[1] < 1e-3
    assert clean[2].isnan()


def test_sum_prefixes_sample_state_with_the_objective() -> None:
    losses, state = torch.tensor([[0.1], [3.0], [math.nan]]), torch.zeros(3, 2)
    both = objective("sum", terms=[{"name": "noisy"}, {"name": "sogclr"}])
    names = both.sample_values({"terms.0.loss": losses, "terms.1.state": state}).keys()
    assert names == {"noisy/loss", "sogclr/image_log_u", "sogclr/text_log_u", "sogclr/log_u"}
