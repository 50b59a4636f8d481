from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def peak(rows: int, tokens: int) -> int:
    """Bytes that a ranking needs beside what it ranks; `tokens` of each, or 0 for vectors."""
    probe = Path(__file__).with_name("memory_probe.py")
    # A freed block is given back at once: what is kept for later is malloc's, not ours.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, probe, str(rows), str(tokens)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "tokens"), [(5_000, 0), (1_000, 4)])
def test_a_ranking_never_holds_all_scores(rows: int, tokens: int) -> None:
    small, large = peak(rows, tokens), peak(3 * rows, tokens)
    assert large < 1.6 * small  # a block's rows, whatever their number
    if not tokens:
        assert large < (3 * rows) ** 2 * 4 / 6  # all scores take 900 MB
