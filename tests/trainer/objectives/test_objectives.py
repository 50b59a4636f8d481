"""InfoNCE on small inputs, and the clamp of the logit scale."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gigabatch.trainer.objectives import Context, build_objective, parse_settings
from gigabatch.trainer.objectives.common import clamp_inward


def test_infonce_with_distinct_samples_equals_cross_entropy() -> None:
    torch.manual_seed(0)
    rows = {t: F.normalize(torch.randn(7, 5), dim=1).requires_grad_() for t in ("image", "text")}
    objective = build_objective(parse_settings({"init_logit_scale": 10.0}))
    loss = objective(rows, {"sample": torch.arange(7)}, Context(None, 1))
    logits, target = 10.0 * rows["image"] @ rows["text"].T, torch.arange(7)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss.value, expected)
    assert loss.metrics["logit_scale"] == pytest.approx(10.0)


def test_positives_column_defines_the_positives() -> None:
    objective = build_objective(parse_settings({"positives": "concept"}))
    assert objective.needs.columns == ("concept",)
    rows = {t: torch.eye(4).requires_grad_() for t in ("image", "text")}
    distinct = objective(rows, {"concept": torch.arange(4)}, Context(None, 1)).value
    equal = objective(rows, {"concept": torch.zeros(4, dtype=torch.int64)}, Context(None, 1)).value
    assert equal > distinct


@pytest.mark.parametrize(("at", "slope", "passes"), [
    (1.0, -1.0, True), (1.0, 1.0, True), (3.0, 1.0, True), (3.0, -1.0, False), (2.0, -1.0, False),
])  # fmt: skip
def test_clamp_passes_inward_gradients_only(at: float, slope: float, passes: bool) -> None:
    x = torch.tensor(at, requires_grad=True)
    y = clamp_inward(x, ceiling=2.0)
    assert y.item() == min(at, 2.0)
    (slope * y).backward()
    assert float(x.grad) == (slope if passes else 0.0)


def test_logit_scale_above_its_limit_decreases() -> None:
    objective = build_objective(parse_settings({"init_logit_scale": 100.0}))
    torch.manual_seed(1)
    images = F.normalize(torch.randn(8, 4), dim=1)
    rows = {"image": images, "text": -images}
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    with torch.no_grad():
        objective.log_scale += 1.0
    for _ in range(3):
        optimizer.zero_grad()
        objective(rows, {"sample": torch.arange(8)}, Context(None, 1)).value.backward()
        optimizer.step()
    assert objective.log_scale.item() < math.log(100.0)
