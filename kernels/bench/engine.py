"""Benchmark of the engine and plain torch on this CPU: time, share of the GEMM rate, memory.

The times of a comparison are measured in turns in one process, each peak in a separate process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gigabatch.kernels.bench.machine import gemm_rate, processor
from gigabatch.kernels.bench.machine import seconds as seconds_of
from gigabatch.kernels.bench.memory import measure_afresh
from gigabatch.kernels.bench.problems import Batch, Tokens, step
from gigabatch.kernels.bench.ring import ring_peaks

Say = Callable[[str], None]
CPU = torch.device("cpu")


def bench(n: int, d: int, sizes: Sequence[int], say: Say) -> dict[str, Any]:
    """Measure the time and memory of losses and of MaxSim, and the memory of the ring.

    Args:
        n: Number of rows of the timed comparison.
        d: Width of the embeddings.
        sizes: Batch sizes over which memory is fitted.
        say: Function that receives one line per result.

    Returns:
        All results.
    """
    results: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    results["processor"] = processor()
    results["date"] = time.strftime("%Y-%m-%d")
    results["losses"] = _losses(n, d, say)
    results["maxsim"] = _maxsim(say)
    results["memory"] = _memory(sizes, d, say)
    peaks = {world: ring_peaks(world) for world in (2, 3, 4, 6, 8)}
    results["ring_peak_mib"] = peaks
    text = ", ".join(f"W={world} {peak:.0f} MiB" for world, peak in peaks.items())
    say(f"ring, 4,096 rows per rank, D 256: peak {text}")
    return results


def fit_exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent e of values ~ sizes^e, by least squares of logarithms."""
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in x)


def _losses(n: int, d: int, say: Say) -> dict[str, Any]:
    names = ("contrastive", "dense", "dense, one matrix", "sigmoid", "dense sigmoid")
    batch = Batch(n, d)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for _ in range(2):
        rates.append(gemm_rate(CPU, torch.float32))
        for name in names:
            seconds[name].append(seconds_of(lambda name=name: step(name, batch), CPU))  # type: ignore[misc]
    best, rate = {name: min(times) for name, times in seconds.items()}, max(rates)
    peaks = {name: measure_afresh(name, n, d)["peak_mib"] for name in names}
    say(f"N {n:,}, D {d}, forward and backward; GEMM {rate / 1e9:.0f} GFLOP/s in the same run")
    for name in names:
        passes = 6 if "sigmoid" in name else 8
        share = passes * n * n * d / best[name] / rate
        say(f"  {name:<18} {best[name]:6.2f} s  {peaks[name]:8.0f} MiB  {share:4.0%} of GEMM"
            f" on the {passes}nND count")  # fmt: skip
    return {"n": n, "d": d, "gemm_flops": rate, "seconds": seconds, "peak_mib": peaks}


def _maxsim(say: Say) -> dict[str, Any]:
    batch, seconds = Tokens(256, 64), {"maxsim": list[float](), "dense maxsim": list[float]()}
    for _ in range(3):
        for name, times in seconds.items():
            times.append(seconds_of(lambda name=name: batch.step(name == "dense maxsim"), CPU))  # type: ignore[misc]
    peaks = {name: measure_afresh(name, 256, 64)["peak_mib"] for name in seconds}
    for name, times in seconds.items():
        say(f"  {name:<18} {min(times):6.2f} s  {peaks[name]:8.0f} MiB   256 x 256 items, "
            "64 x 32 tokens, D 64")  # fmt: skip
    keys = (512, 1024, 2048, 4096)
    runs = [measure_afresh("maxsim", n, 64) for n in keys]
    slopes = {
        name: fit_exponent(keys, [run[name] for run in runs]) for name in ("seconds", "peak_mib")
    }
    say(f"  maxsim over {keys} keys: time ~ keys^{slopes['seconds']:.2f}, "
        f"memory ~ keys^{slopes['peak_mib']:.2f}")  # fmt: skip
    return {"seconds": seconds, "peak_mib": peaks, "exponents": slopes}


def _memory(sizes: Sequence[int], d: int, say: Say) -> dict[str, Any]:
    peaks = [measure_afresh("contrastive", n, d)["peak_mib"] for n in sizes]
    exponent = fit_exponent(sizes, peaks)
    text = ", ".join(f"{n:,}: {peak:.0f}" for n, peak in zip(sizes, peaks, strict=True))
    say(f"contrastive, D {d}, MiB by N: {text}: memory ~ N^{exponent:.2f}")
    return {"sizes": list(sizes), "peak_mib": peaks, "exponent": exponent}
