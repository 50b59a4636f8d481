"""Parameter groups and learning rate schedules."""

from __future__ import annotations

import pytest
from torch import nn

from gigabatch.trainer.config import ScheduleSettings
from gigabatch.trainer.optim import lr_factor, tower_groups


def test_weight_decay_applies_to_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    decayed, undecayed = tower_groups(model.named_parameters(), 0.3)
    assert decayed["weight_decay"] == 0.3
    assert undecayed["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in undecayed["params"]} == {1}
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(model.parameters()))


def test_model_with_matrices_only_has_one_group() -> None:
    model = nn.Linear(3, 4, bias=False)
    assert len(tower_groups(model.named_parameters(), 0.1)) == 1


@pytest.mark.parametrize(
    ("name", "step", "factor"),
    [
        ("cosine", 1, 0.1), ("cosine", 10, 1.0), ("cosine", 55, 0.55), ("cosine", 100, 0.1),
        ("constant", 5, 0.5), ("constant", 100, 1.0),
        ("wsd", 60, 1.0), ("wsd", 80, 1.0), ("wsd", 90, 0.55), ("wsd", 100, 0.1),
    ],
)  # fmt: skip
def test_schedule_returns_known_factors(name: str, step: int, factor: float) -> None:
    settings = ScheduleSettings(name=name, warmup_steps=10, decay_steps=20, floor=0.1)
    assert lr_factor(step, 100, settings) == pytest.approx(factor)


def test_run_shorter_than_its_warmup_ends_below_full_learning_rate() -> None:
    assert lr_factor(5, 5, ScheduleSettings(warmup_steps=10)) == 0.5
