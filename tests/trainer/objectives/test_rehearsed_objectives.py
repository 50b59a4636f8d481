"""Two samples are enough for every objective, so that a rehearsal never refuses a good run."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
from harness import WIDTH, batch, examples

from gigabatch.launcher.preflight.rehearsal import rehearse_objective
from gigabatch.trainer.objectives import build_objective


@pytest.mark.parametrize("label", examples())
def test_objective_accepts_two_samples(label: str) -> None:
    settings, example = examples()[label]
    torch.manual_seed(0)
    objective = build_objective(settings.for_any_device(), width=WIDTH)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        part = batch(example, 1).rows(rows)
        needs = objective.needs
        rehearse_objective(
            objective,
            {tap: part.outputs[tap] for tap in needs.taps},
            {f"teacher.{tap}": part.outputs[f"teacher.{tap}"] for tap in needs.teacher},
            MappingProxyType(part.meta),
        )
