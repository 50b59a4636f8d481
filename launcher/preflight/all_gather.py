"""One rank of `gigabatch doctor`'s all-gather; rank 0 prints what was measured, as JSON."""

from __future__ import annotations

import json
import time
from statistics import median

import torch
import torch.distributed as dist

from gigabatch.trainer.distributed import World, join_world, leave

SMALL, LARGE = 1 << 10, 16 << 20  # bytes of each rank


def _seconds(world: World, size: int, times: int) -> float:
    """Median time of one all-gather of `size` bytes a rank."""
    own = torch.zeros(size, dtype=torch.uint8, device=world.device)
    parts = [torch.empty_like(own) for _ in range(world.size)]
    took = []
    for _ in range(times):
        began = time.perf_counter()
        if world.group is not None:
            dist.all_gather(parts, own, group=world.group)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return median(took[len(took) // 5 :])  # the first ones set up connections


if __name__ == "__main__":
    with join_world(1) as world:
        small, large = _seconds(world, SMALL, 100), _seconds(world, LARGE, 10)
        if world.is_main:
            received = LARGE * (world.size - 1)
            print(
                json.dumps(
                    {
                        "backend": dist.get_backend(),
                        "latency_us": small * 1e6,
                        "bytes_per_s": received / large,
                    }
                ),
                flush=True,
            )
    leave(0)
