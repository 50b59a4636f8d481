from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.backdoor import attack_values, collapse, summarize_attack
from gigabatch.trainer.evaluation.metrics.statistics import intervals

SINGLE = World(0, 1, torch.device("cpu"), None)


def test_attack_success_counts_only_triggered_samples_of_other_classes() -> None:
    top = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    classes = torch.tensor([3, 4, 4, 4, 4, 3])
    triggered = torch.tensor([True, True, True, True, False, False])
    values = attack_values({"top1": top}, classes, 3, triggered)
    metrics = summarize_attack(values)
    assert metrics == {"attack_success": pytest.approx(2 / 3), "clean_top1": 0.5}
    missing = [math.isnan(v) for v in values["attack_success"].tolist()]
    assert missing == [True, False, False, False, True, True]
    clean = {name: column[4:] for name, column in values.items()}
    assert summarize_attack(clean) == {"clean_top1": 0.5}  # a slice without triggered samples
    # Intervals skip resamples without a triggered sample.
    low, high = intervals(values, summarize_attack, seed=0)["attack_success"]
    assert 0 <= low < 2 / 3 < high <= 1


def test_collapse_is_the_mean_cosine_of_pairs() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(20, 4))
    x[:8] += 3
    flags = np.arange(20) < 8
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    metrics = collapse(torch.from_numpy(x), torch.from_numpy(flags), SINGLE)
    for name, rows in (("triggered_cosine", unit[flags]), ("clean_cosine", unit[~flags])):
        cosines = (rows @ rows.T)[~np.eye(len(rows), dtype=bool)]
        assert metrics[name] == pytest.approx(cosines.mean())
    assert metrics["triggered_cosine"] > 0.5 > metrics["clean_cosine"]
