from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def peak(rows: int, tokens: int) -> int:
    """Measure the bytes that a ranking needs beyond its inputs; `tokens` is 0 for vectors."""
    probe = Path(__file__).with_name("memory_probe.py")
    # Return freed blocks to the system at once, so that malloc's reserve is not measured.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, probe, str(rows), str(tokens)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "tokens"), [(5_000, 0), (1_000, 4)])
def test_ranking_memory_does_not_grow_quadratically(rows: int, tokens: int) -> None:
    small, large = peak(rows, tokens), peak(3 * rows, tokens)
    assert large < 1.6 * small  # one block of rows for any number of queries
    if not tokens:
        assert large < (3 * rows) ** 2 * 4 / 6  # all scores would take 900 MB
