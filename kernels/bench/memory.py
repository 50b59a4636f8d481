"""Peak memory of one loss, forward and backward, above its inputs and gradients (CPU).

    python -m gigabatch.kernels.bench.memory --n 32768 --d 256

Peak memory is VmHWM of this process, reset through /proc/self/clear_refs once the inputs are made
and a small problem has warmed everything up. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels import contrastive_loss

MIB = 2**20


def measure(n: int, d: int, dense: bool = False, threads: int | None = None) -> dict[str, float]:
    """Figures of `contrastive_loss` (or, `dense`, of plain torch in open_clip's form) on float32
    embeddings [n, d]: `peak_mib` above inputs and gradients, `seconds`, `loss`."""
    if threads:
        torch.set_num_threads(threads)
    _step(*_inputs(256, d), dense)
    q, k, scale = _inputs(n, d)
    before = _reset_peak()
    began = time.perf_counter()
    loss = _step(q, k, scale, dense)
    seconds = time.perf_counter() - began
    gradients = 2 * n * d * q.element_size()
    peak = _status("VmHWM") - before - gradients
    return {"n": n, "d": d, "peak_mib": peak / MIB, "seconds": seconds, "loss": loss}


def _inputs(n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    q, k = (F.normalize(torch.randn(n, d, generator=generator), dim=1) for _ in range(2))
    return q.requires_grad_(), k.requires_grad_(), torch.tensor(20.0, requires_grad=True)


def _step(q: Tensor, k: Tensor, scale: Tensor, dense: bool) -> float:
    if dense:
        logits, target = scale * q @ k.T, torch.arange(len(q))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    else:
        loss = contrastive_loss(q, k, scale)
    loss.backward()
    return loss.item()


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=32768, help="rows, the global batch")
    parser.add_argument("--d", type=int, default=256, help="width")
    parser.add_argument("--dense", action="store_true", help="plain torch instead; O(n^2) memory")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    arguments = parser.parse_args()
    print(json.dumps(measure(**vars(arguments))))


if __name__ == "__main__":
    main()
