"""The examples run as their docstrings describe, and their losses decrease."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run(*command: str | Path) -> tuple[list[float], float]:
    """Run an example; return its printed losses and recall."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"^step \d+  loss (.+)$", done.stdout, re.M)]
    (recall,) = re.findall(r"^recall@1 of 256 new pairs: (.+)$", done.stdout, re.M)
    return losses, float(recall)


def test_plain_loop_trains() -> None:
    losses, recall = run(sys.executable, EXAMPLES / "plain_loop.py")
    assert len(losses) == 3
    assert losses[-1] < losses[0] / 2
    assert recall > 0.9  # untrained: below 0.05


def test_ddp_loop_has_equal_losses_on_one_and_two_processes() -> None:
    one, two = (run(*TORCHRUN, str(n), EXAMPLES / "ddp_loop.py") for n in (1, 2))
    assert len(two[0]) == 3
    assert two[0] == pytest.approx(one[0], abs=2e-4)  # printed with four decimals
    assert two[0][-1] < two[0][0] / 2
    assert min(one[1], two[1]) > 0.9
