"""Sinkhorn assignments whose scaling vectors are near the limits of float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gigabatch.trainer.objectives.swav import balanced


def assign_in_log_space(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Compute Sinkhorn's assignments in float64 logarithms."""
    logs = scores.double() / epsilon
    for _ in range(iterations):
        logs = logs - logs.logsumexp(0) - math.log(logs.shape[1])
        logs = logs - logs.logsumexp(1, keepdim=True)
    return logs.exp()


@pytest.mark.parametrize("epsilon", [0.003, 0.0299, 0.03, 0.05])
def test_assignments_of_extreme_scores_match_log_space(epsilon: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = 2 * torch.rand(64, 9, generator=generator) - 1
    scores[:, 4] = -1  # the prototype with the lowest scores
    scores[:, 2] = 1  # the prototype with the highest scores
    scores[:8] = -1  # rows with the lowest score for every prototype
    assignments = balanced(scores, epsilon, 3, None)
    torch.testing.assert_close(
        assignments.double(), assign_in_log_space(scores, epsilon, 3), rtol=2e-5, atol=1e-7
    )
    torch.testing.assert_close(assignments.sum(1), torch.ones(64))
