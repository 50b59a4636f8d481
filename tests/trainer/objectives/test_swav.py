"""Sinkhorn's assignments where scaling vectors are at the edge of what a float holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gigabatch.trainer.objectives.swav import balanced


def by_logarithms(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    logs = scores.double() / epsilon
    for _ in range(iterations):
        logs = logs - logs.logsumexp(0) - math.log(logs.shape[1])
        logs = logs - logs.logsumexp(1, keepdim=True)
    return logs.exp()


@pytest.mark.parametrize("epsilon", [0.003, 0.0299, 0.03, 0.05])
def test_assignments_of_the_widest_scores_are_those_by_logarithms(epsilon: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = 2 * torch.rand(64, 9, generator=generator) - 1
    scores[:, 4] = -1  # a prototype that nobody likes, beside one that everybody does
    scores[:, 2] = 1
    scores[:8] = -1  # and rows that like none
    assignments = balanced(scores, epsilon, 3, None)
    torch.testing.assert_close(
        assignments.double(), by_logarithms(scores, epsilon, 3), rtol=2e-5, atol=1e-7
    )
    torch.testing.assert_close(assignments.sum(1), torch.ones(64))
