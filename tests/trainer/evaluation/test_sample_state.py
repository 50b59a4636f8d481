from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gigabatch.trainer.evaluation.sample_state import by_value, spread
from gigabatch.trainer.evaluation.tags import MOST_SLICES
from gigabatch.trainer.objectives import build_objective, parse_settings

LOW = -math.inf


def test_spread_is_that_of_sorted_values() -> None:
    values = np.random.default_rng(0).normal(size=101)
    told = spread({"loss": torch.from_numpy(values)})
    held = np.sort(values)
    assert told == pytest.approx(
        {
            "loss/mean": values.mean(), "loss/min": held[0], "loss/max": held[-1],
            "loss/p05": held[5], "loss/p25": held[25], "loss/median": held[50],
            "loss/p75": held[75], "loss/p95": held[95],
        }
    )  # fmt: skip


def test_means_by_value_and_their_correlation_with_log_frequency() -> None:
    random = np.random.default_rng(1)
    kinds = random.choice(["a", "b", "c", "d"], 200, p=[0.6, 0.2, 0.15, 0.05]).tolist()
    values = random.normal(size=200) + np.array([kind == "a" for kind in kinds])
    told = by_value({"tau": torch.from_numpy(values)}, kinds, "kind")
    assert told["kind/values"] == 4
    means, counts = [], []
    for kind in "abcd":
        own = [v for v, k in zip(values, kinds, strict=True) if k == kind]
        assert told[f"kind={kind}/tau"] == pytest.approx(np.mean(own))
        assert told[f"kind={kind}/count"] == len(own)
        means.append(np.mean(own))
        counts.append(np.log(len(own)))
    m, c = np.array(means) - np.mean(means), np.array(counts) - np.mean(counts)
    wanted = (m * c).sum() / np.sqrt((m * m).sum() * (c * c).sum())
    assert told["tau/log_frequency_correlation"] == pytest.approx(wanted)


def test_no_correlation_without_differences_and_no_endless_lists() -> None:
    values = torch.arange(4.0, dtype=torch.float64)
    assert by_value({"tau": values}, [1, 1, 2, 2], "k").keys() == {
        "k/values", "k=1/count", "k=2/count", "k=1/tau", "k=2/tau",
    }  # fmt: skip
    many = torch.arange(MOST_SLICES + 2.0, dtype=torch.float64)
    kinds = [0, *range(MOST_SLICES + 1)]
    assert by_value({"tau": many}, kinds, "k").keys() == {
        "k/values", "tau/log_frequency_correlation",
    }  # fmt: skip


def test_what_sogclr_keeps() -> None:
    rows = torch.tensor([[0.1, 0.3, 0.05, 0.07, 0, 0], [LOW, LOW, 0.5, 0.5, 0, 0]])
    settings = parse_settings({"name": "sogclr", "temperatures": "individual"})
    told = build_objective(settings).sample_values({"state": rows})
    assert {name: value[0].item() for name, value in told.items()} == pytest.approx(
        {
            "image_log_u": 0.1, "text_log_u": 0.3, "log_u": 0.2,
            "image_temperature": 0.05, "text_temperature": 0.07, "temperature": 0.06,
        }
    )  # fmt: skip
    assert all(value[1].isnan() for value in told.values())  # not seen yet
    fixed = parse_settings({"name": "sogclr"})
    assert "temperature" not in build_objective(fixed).sample_values({"state": rows[:, :2]})


def test_what_noisy_keeps_and_a_sum_of_both() -> None:
    losses = torch.tensor([[0.1], [3.0], [math.nan]])
    noisy = build_objective(parse_settings({"name": "noisy"}))
    assert noisy.sample_values({"loss": losses}).keys() == {"loss"}  # not split yet
    split = torch.tensor([[0.2, 0.1, 0.5], [2.5, 0.3, 0.5]])
    noisy.get_buffer("split").copy_(split)
    clean = noisy.sample_values({"loss": losses})["clean_probability"]
    density = [
        share * math.exp(-((0.2 - mean) ** 2) / 2 / variance) / math.sqrt(variance)
        for mean, variance, share in split.tolist()
    ]  # beyond a mean the probability is that at the mean
    assert clean[0].item() == pytest.approx(density[0] / sum(density), rel=1e-5)
    assert clean[1] < 1e-3
    assert clean[2].isnan()
    both = build_objective(
        parse_settings({"name": "sum", "terms": [{"name": "noisy"}, {"name": "sogclr"}]})
    )
    state = torch.zeros(3, 2)
    told = both.sample_values({"terms.0.loss": losses, "terms.1.state": state})
    assert told.keys() == {"noisy/loss", "sogclr/image_log_u", "sogclr/text_log_u", "sogclr/log_u"}
