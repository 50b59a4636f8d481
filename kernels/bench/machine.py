"""Measurements of the machine that runs a benchmark: time, memory, matmul rate, versions."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

GEMM_SIDES = {"cpu": 2048, "cuda": 8192}
PACKAGES = ("triton", "open_clip_torch", "inf_cl", "liger_kernel", "cut_cross_entropy")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time `work` until the device has finished; an error of the device is raised here."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(stop)) / 1e3


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product, the median of several runs."""
    side = GEMM_SIDES[device.type]
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    times = [seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(5)]
    return 2 * side**3 / median(times[2:])


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a benchmark may use: a GPU's free memory, or half of the system's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert match is not None
    return int(match[1]) * 1024 // 2


def peak_of(work: Callable[[], float], device: torch.device) -> tuple[float, int | None]:
    """Return the result of `work`, and its peak bytes above those held before (CPU: None)."""
    if device.type != "cuda":
        return work(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return work(), torch.cuda.max_memory_allocated(device) - before


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the device and the versions of the packages that matter."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """Return the CPU's model name."""
    match = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
