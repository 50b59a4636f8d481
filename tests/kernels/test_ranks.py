"""The loss over real gloo processes equals the loss of the whole batch in one.

Convention under test: the mean over ranks of the values is the loss; gradients averaged over ranks
are its gradients. So what a rank's own slice receives, divided by the world size, is the gradient.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense import Case, Result, assert_as_exact_as_torch, positives
from loss_ranks import cases
from torch import Tensor

SCRIPT = Path(__file__).with_name("loss_ranks.py")


def run_group(world_size: int, folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    """All cases on `world_size` processes; rank -> case -> results."""
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder / "store", folder, str(rank), str(world_size)],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, said
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.mark.parametrize(
    "world_size",
    [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def test_ranks_together_equal_one_process(world_size: int, tmp_path: Path) -> None:
    ranks = run_group(world_size, tmp_path)
    for name, case in cases(world_size).items():
        found = [rank[name] for rank in ranks]
        for rank, part in enumerate(found):
            assert len(part["dq"]) == case.queries[rank]
            assert len(part["dk"]) == case.keys[rank]
        # Ids over slices without them are the rows' numbers in the whole batch.
        whole = case.whole
        if whole.ids_q is None:
            ids = torch.arange(len(whole.q))
            whole = Case(whole.q, whole.k, whole.scale, ids, ids, whole.symmetric)
        together = Result(
            torch.stack([part["value"] for part in found]).mean(),
            torch.cat([part["dq"] for part in found]) / world_size,
            torch.cat([part["dk"] for part in found]) / world_size,
            torch.stack([part["dscale"] for part in found]).mean(),
        )
        assert together.finite(), name
        if positives(whole).any():
            assert together.value > 0, name
        else:
            for tensor in (together.value, together.dq, together.dk, together.dscale):
                assert not tensor.any(), name
        assert_as_exact_as_torch(whole, together)
