"""Process group, device and threads of a rank. The same for Ray, torchrun and a single process."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=30)
"""Of a collective. Longer than `train.hang_timeout_s` may be: the watchdog's word comes first."""
JOIN_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run. `group` is None when it is the only one."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """`value` added over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank: one small collective."""
        if self.group is None:
            return list(flags)
        held = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in held]

    def concat(self, rows: Tensor) -> tuple[Tensor, int]:
        """All ranks' rows [n, ...], n of each its own, in rank order; and where this rank's
        begin."""
        if self.group is None:
            return rows, 0
        sizes = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(rows)
        counts = self.sum(sizes).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        joined = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
        return joined, sum(counts[: self.rank])

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        return box[0]


def alone() -> World:
    """This process by itself, without a process group."""
    return World(0, 1, device_of_this_process(), None)


@contextmanager
def join_world(threads: int) -> Iterator[World]:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT), or one that is already there; with no RANK set, be the only process.

    A group of several is taken down at the end; a group of one stays, for DeepSpeed holds on to
    the first that it sees in a process.
    """
    torch.set_num_threads(threads)
    device = device_of_this_process()
    backend = "nccl" if device.type == "cuda" else "gloo"
    joined = not dist.is_initialized() and "RANK" in os.environ
    if joined:
        _join_from_environment(backend)
    elif not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        size = dist.get_world_size()
        group = dist.group.WORLD if size > 1 else None
        yield World(dist.get_rank(), size, device, group)
    finally:
        if joined and dist.is_initialized():
            dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a rank's process here and now, its output flushed.

    gloo's threads outlive `destroy_process_group` wherever something (DeepSpeed's globals) still
    holds a group, and abort an interpreter that takes itself down: a finished rank would count as
    crashed. Seen with torch 2.13, three ranks, busy cores: one time in four.
    """
    logging.shutdown()
    for output in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone
            output.flush()
    os._exit(code)


def _join_from_environment(backend: str) -> None:
    store, rank, size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    # torchrun keeps its store when it starts workers again, with the addresses of the dead in it.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"start-{start}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def device_of_this_process() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Ray shows a worker only its own device; torchrun shows all and numbers the workers.
    local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
