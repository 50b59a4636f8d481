"""Peak memory of the ring by world size, at a fixed batch per rank (CPU, gloo).

Each rank is a process with one thread; the result is the maximum over ranks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from gigabatch.kernels import contrastive_loss
from gigabatch.kernels.bench.memory import MIB, status
from gigabatch.kernels.bench.problems import Batch

ROWS, WIDTH = 4096, 256


def ring_peaks(world_size: int, gather_mode: str = "ring") -> float:
    """Return peak MiB of one contrastive loss above inputs and gradients, over all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, folder, str(rank), str(world_size), gather_mode],
                stdout=subprocess.PIPE, text=True,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        try:
            outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"ranks ended with {[rank.returncode for rank in ranks]}")
    return max(float(text) for text in outputs)


def main(folder: str, rank: int, world_size: int, gather_mode: str) -> None:
    """Run one rank; print its peak in MiB."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    for rows in (64, ROWS):
        batch = Batch(rows, WIDTH)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        loss = contrastive_loss(
            batch.q, batch.k, batch.scale, group=dist.group.WORLD,
            gather_mode="ring" if gather_mode == "ring" else "gather",
        )  # fmt: skip
        loss.backward()
    gradients = 2 * 4 * ROWS * WIDTH
    peak = (status("VmHWM") - before - gradients) / MIB
    dist.barrier()
    print(peak)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
