from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_ranking_never_holds_all_scores() -> None:
    def measured(rows: int) -> int:
        probe = Path(__file__).with_name("memory_probe.py")
        # A freed block is given back at once: what is kept for later is malloc's, not ours.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(
            [sys.executable, probe, str(rows)],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        return int(done.stdout)

    small, large = measured(5_000), measured(15_000)
    assert large < 15_000**2 * 4 / 6  # all scores take 900 MB
    assert large < 1.6 * small  # a block's rows, whatever their number
