from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_ranking_never_holds_all_scores() -> None:
    def measured(rows: int) -> int:
        probe = Path(__file__).with_name("memory_probe.py")
        done = subprocess.run(
            [sys.executable, probe, str(rows)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    small, large = measured(7_000), measured(21_000)
    assert large < 21_000**2 * 4 / 6  # all scores take 1.8 GB
    assert large < 1.5 * small  # a block's rows, whatever their number
