"""With one negative and one positive of equal score, DCL is 0 and InfoNCE is log 2."""

import torch

from gigabatch.trainer.objectives import Context, build_objective, parse_settings


def test_dcl_of_equal_scores_is_zero() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    objective = build_objective(parse_settings({"name": "dcl"}))
    loss = objective({"image": rows, "text": rows}, {"sample": torch.arange(2)}, Context(None, 1))
    torch.testing.assert_close(loss.value, torch.tensor(0.0))
