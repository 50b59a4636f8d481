from __future__ import annotations

import pytest
from torch import nn

from gigabatch.trainer.config import ScheduleSettings
from gigabatch.trainer.optim import lr_factor, tower_groups


def test_only_matrices_are_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    decayed, plain = tower_groups(model.named_parameters(), 0.3)
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_a_model_without_vectors_has_one_group() -> None:
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
def test_schedules_pass_through_their_points(name: str, step: int, factor: float) -> None:
    settings = ScheduleSettings(name=name, warmup_steps=10, decay_steps=20, floor=0.1)
    assert lr_factor(step, 100, settings) == pytest.approx(factor)


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    assert lr_factor(5, 5, ScheduleSettings(warmup_steps=10)) == 0.5
