"""One rank of the all-gather of `gigabatch doctor`; rank 0 prints the measurements as JSON."""

from __future__ import annotations

import json
import time
from statistics import median

import torch
import torch.distributed as dist

from gigabatch.trainer.distributed import World, exit_now, join_world

SMALL, LARGE = 1 << 10, 16 << 20  # bytes per rank


def median_seconds(world: World, size: int, times: int) -> float:
    """Return the median seconds of an all-gather of `size` bytes from each rank."""
    local = torch.zeros(size, dtype=torch.uint8, device=world.device)
    parts = [torch.empty_like(local) for _ in range(world.size)]
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        if world.group is not None:
            dist.all_gather(parts, local, group=world.group)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds[len(seconds) // 5 :])  # the first runs also set up connections


if __name__ == "__main__":
    with join_world(1) as world:
        small, large = median_seconds(world, SMALL, 100), median_seconds(world, LARGE, 10)
        if world.is_main:
            received = LARGE * (world.size - 1)
            result = {
                "backend": dist.get_backend(),
                "latency_us": small * 1e6,
                "bytes_per_s": received / large,
            }
            print(json.dumps(result), flush=True)
    exit_now(0)
