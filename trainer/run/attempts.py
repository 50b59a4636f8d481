"""What is known of each start of the workers: where they ran, and under which settings.

attempts/000001.json  time, config, `saved` (the newest checkpoint then), workers, environment
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from gigabatch.trainer.distributed import World
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
RECORDED = (
    "NCCL_", "TORCH_NCCL_", "GLOO_", "FI_", "UCX_", "OMP_", "MKL_", "CUDA_", "PYTORCH_", "TRITON_",
)  # fmt: skip
"""How the environment variables begin that can change a run's speed or success, or its last bit."""
OWN_TO_A_RANK = ("CUDA_VISIBLE_DEVICES",)


@dataclass(frozen=True)
class Worker:
    rank: int
    host: str
    device: str
    environment: Mapping[str, str]


def begin_attempt(run: RunFolder, world: World) -> int:
    """Number this start of the workers and record it. A collective; the number, on every rank."""
    workers = [Worker(**each) for each in world.gather(asdict(_this_worker(world)))]
    number = None
    if world.is_main:
        for line in unlike(workers):
            log.warning("%s", line)
        shown = [{"rank": w.rank, "host": w.host, "device": w.device} for w in workers]
        number = run.take_attempt(workers=shown, environment=workers[0].environment)
    return int(world.share(number))


def _this_worker(world: World) -> Worker:
    on_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else world.device.type
    seen = {k: v for k, v in sorted(os.environ.items()) if k.startswith(RECORDED)}
    return Worker(world.rank, platform.node(), device, seen)


def unlike(workers: Sequence[Worker]) -> list[str]:
    """A sentence for each setting in which workers differ from rank 0's: seldom meant so."""
    told = []
    first = workers[0].environment
    names = {name for w in workers for name in w.environment if name not in OWN_TO_A_RANK}
    for name in sorted(names):
        others = [w for w in workers if w.environment.get(name) != first.get(name)]
        if others:
            w = others[0]
            more = f" (and {len(others) - 1} more ranks)" if len(others) > 1 else ""
            told.append(
                f"{name} is {w.environment.get(name, 'unset')} for rank {w.rank} on {w.host}{more} "
                f"and {first.get(name, 'unset')} for rank 0 on {workers[0].host}. cluster.env "
                "sets it for all alike."
            )
    return told
