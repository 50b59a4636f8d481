"""Batches without a usable pair: zero loss and zero gradients, no NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter

from gigabatch.trainer.config import AnyObjective
from gigabatch.trainer.objectives import Context, build_objective


@pytest.mark.parametrize("kind", ["fixed", "shared", "individual"])
@pytest.mark.parametrize("taps", [("image", "text"), ("image", "image@1")])
def test_sogclr_without_negatives_has_zero_gradients(kind: str, taps: tuple[str, str]) -> None:
    settings = {"name": "sogclr", "taps": taps, "positives": "concept", "temperatures": kind}
    objective = build_objective(TypeAdapter(AnyObjective).validate_python(settings), width=4)
    rows = {tap: F.normalize(torch.randn(3, 4), dim=1).requires_grad_() for tap in taps}
    first = objective.needs.tables["state"]
    state = torch.tensor([first] * 3)
    meta = {"sample": torch.arange(3), "concept": torch.zeros(3, dtype=torch.int64)}
    loss = objective(rows, {**meta, "state": state}, Context(None, 1))
    loss.value.backward()
    assert float(loss.value.detach()) == 0
    assert all(x.grad is not None and not x.grad.any() for x in rows.values())
    assert torch.equal(loss.updates()["state"][:, 0], state[:, 0])


def test_swav_without_a_complete_sample_has_zero_gradients() -> None:
    settings = {"name": "swav", "taps": ("image", "image@1", "text")}
    objective = build_objective(TypeAdapter(AnyObjective).validate_python(settings), width=4)
    taps = ("image", "image@1", "text")
    rows = {tap: F.normalize(torch.randn(3, 4), dim=1).requires_grad_() for tap in taps}
    meta = {"sample": torch.arange(3), "text_present": torch.zeros(3, dtype=torch.bool)}
    loss = objective(rows, meta, Context(None, 1))
    loss.value.backward()
    assert float(loss.value.detach()) == 0
    assert all(x.grad is not None and not x.grad.any() for x in rows.values())
