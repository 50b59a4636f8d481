from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.statistics import intervals
from gigabatch.trainer.evaluation.trigger import attack_figures, attack_summary, collapse

ALONE = World(0, 1, torch.device("cpu"), None)


def test_success_counts_triggered_samples_of_other_classes_alone() -> None:
    top = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    classes = torch.tensor([3, 4, 4, 4, 4, 3])
    triggered = torch.tensor([True, True, True, True, False, False])
    figures = attack_figures({"top1": top}, classes, 3, triggered)
    told = attack_summary(figures)
    assert told == {"attack_success": pytest.approx(2 / 3), "clean_top1": 0.5}
    assert [math.isnan(v) for v in figures["attack_success"].tolist()] == [True] + [False] * 3 + [
        True
    ] * 2
    clean = {name: values[4:] for name, values in figures.items()}
    assert attack_summary(clean) == {"clean_top1": 0.5}  # a slice without a trigger
    # Some draws of six hold no triggered sample; the interval is over those that do.
    low, high = intervals(figures, attack_summary, seed=0)["attack_success"]
    assert 0 <= low < 2 / 3 < high <= 1


def test_collapse_is_the_mean_cosine_of_pairs() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(20, 4))
    x[:8] += 3
    flags = np.arange(20) < 8
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    told = collapse(torch.from_numpy(x), torch.from_numpy(flags), ALONE)
    for name, rows in (("triggered_cosine", unit[flags]), ("clean_cosine", unit[~flags])):
        cosines = (rows @ rows.T)[~np.eye(len(rows), dtype=bool)]
        assert told[name] == pytest.approx(cosines.mean())
    assert told["triggered_cosine"] > 0.5 > told["clean_cosine"]
