from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_metrics import sharded_metrics
from support import run_ranks

from gigabatch.trainer.distributed import World


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_metrics_on_several_ranks_equal_those_on_one(ranks: int) -> None:
    one_rank: dict[str, Any] = sharded_metrics(World(0, 1, torch.device("cpu"), None))
    sharded = run_ranks(Path(__file__).with_name("sharded_metrics_probe.py"), ranks)
    assert sharded.keys() == one_rank.keys()
    for name, value in one_rank.items():
        if name.startswith(("geometry/", "regression/")):
            assert sharded[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        else:
            assert sharded[name] == value, name
