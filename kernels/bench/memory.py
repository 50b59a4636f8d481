"""Peak memory of one step of a problem, above its inputs and their gradients (CPU).

    python -m gigabatch.kernels.bench.memory --n 32768 --d 256

Peak memory is VmHWM of this process. It is reset through /proc/self/clear_refs after the inputs are
made and a small problem has run as a warm-up. The output is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from gigabatch.kernels.bench.problems import PROBLEMS, Batch, Tokens, step

MIB = 2**20
MAXSIM = ("maxsim", "dense maxsim")
NAMES = (*PROBLEMS, *MAXSIM)


def measure(problem: str, n: int, d: int) -> dict[str, float]:
    """Measure one step in float32 on n rows of width d, in this process.

    For MaxSim, n is the number of keys; there are 256 queries.

    Returns:
        `peak_mib` above inputs and gradients, `seconds`, `value`, and `n` and `d`.
    """
    small, batch = _make(problem, 256, d), _make(problem, n, d)
    _step(problem, small)
    del small
    ctypes.CDLL(None).malloc_trim(0)  # otherwise, memory that the warm-up freed counts
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    began = time.perf_counter()
    value = _step(problem, batch)
    seconds = time.perf_counter() - began
    gradients = sum(t.grad.nbytes for t in (batch.q, batch.k) if t.grad is not None)
    peak = status("VmHWM") - before - gradients
    return {"n": n, "d": d, "peak_mib": peak / MIB, "seconds": seconds, "value": value}


def measure_afresh(problem: str, n: int, d: int, threads: int | None = None) -> dict[str, float]:
    """Run `measure` in a new process."""
    command = [sys.executable, "-m", __name__, problem, "--n", str(n), "--d", str(d)]
    command += ["--threads", str(threads)] if threads else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    results: dict[str, float] = json.loads(done.stdout)
    return results


def _make(problem: str, n: int, d: int) -> Batch | Tokens:
    return Tokens(256, d, n) if problem in MAXSIM else Batch(n, d)


def _step(problem: str, batch: Batch | Tokens) -> float:
    if isinstance(batch, Tokens):
        return batch.step(dense=problem == "dense maxsim")
    return step(problem, batch)


def status(field: str) -> int:
    """Return bytes of this process from /proc: VmRSS is the current memory, VmHWM the peak."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", nargs="?", default="contrastive", choices=NAMES)
    parser.add_argument("--n", type=int, default=32768, help="rows of the global batch")
    parser.add_argument("--d", type=int, default=256, help="width of the embeddings")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(json.dumps(measure(arguments.problem, arguments.n, arguments.d)))


if __name__ == "__main__":
    main()
