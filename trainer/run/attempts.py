"""Records of attempts: one per start of the workers, with their hosts and environment variables.

attempts/000001.json  time, config, `saved` (newest checkpoint at the start), workers, environment
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
"""Prefixes of recorded environment variables, which can change speed, success or last bits."""
PER_RANK = ("CUDA_VISIBLE_DEVICES",)
"""Environment variables that differ between ranks by design."""


@dataclass(frozen=True)
class Worker:
    """Host and device of one rank, and its environment variables with a `RECORDED` prefix."""

    rank: int
    host: str
    device: str
    environment: Mapping[str, str]


def begin_attempt(run: RunFolder, world: World) -> int:
    """Record this start of the workers; return its number on every rank.

    Collective: every rank must call it.
    """
    workers = [Worker(**fields) for fields in world.gather(asdict(_this_worker(world)))]
    number = None
    if world.is_main:
        for warning in environment_differences(workers):
            log.warning("%s", warning)
        shown = [{"rank": w.rank, "host": w.host, "device": w.device} for w in workers]
        number = run.take_attempt(workers=shown, environment=workers[0].environment)
    return int(world.broadcast(number))


def _this_worker(world: World) -> Worker:
    on_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else world.device.type
    recorded = {k: v for k, v in sorted(os.environ.items()) if k.startswith(RECORDED)}
    return Worker(world.rank, platform.node(), device, recorded)


def environment_differences(workers: Sequence[Worker]) -> list[str]:
    """Return a warning for each environment variable that differs from rank 0's."""
    warnings = []
    first = workers[0].environment
    names = {name for w in workers for name in w.environment if name not in PER_RANK}
    for name in sorted(names):
        others = [w for w in workers if w.environment.get(name) != first.get(name)]
        if others:
            w = others[0]
            more = f" (and {len(others) - 1} more ranks)" if len(others) > 1 else ""
            warnings.append(
                f"{name} is {w.environment.get(name, 'unset')} for rank {w.rank} on {w.host}{more} "
                f"but {first.get(name, 'unset')} for rank 0 on {workers[0].host}. Set it for all "
                "ranks with cluster.env."
            )
    return warnings
