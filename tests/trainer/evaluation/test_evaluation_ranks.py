from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from figures_of_ranks import figures
from support import run_ranks

from gigabatch.trainer.distributed import World


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_figures_do_not_depend_on_the_ranks(ranks: int) -> None:
    alone: dict[str, Any] = figures(World(0, 1, torch.device("cpu"), None))
    together = run_ranks(Path(__file__).with_name("figures_probe.py"), ranks)
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        if name.startswith(("geometry/", "regression/")):
            assert together[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        else:
            assert together[name] == value, name
