"""Process group, device and threads of a rank, under Ray, torchrun and in a single process."""

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
"""Timeout of a collective. It exceeds the largest `train.hang_timeout_s`, so that the watchdog's
report comes first."""
JOIN_TIMEOUT = timedelta(minutes=10)
"""Time for all ranks to join the process group."""


@dataclass(frozen=True)
class World:
    """This process and the ranks of its run.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Device of this process.
        group: Process group; None for a single process.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run folder."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum `value` over ranks, in place, and return it.

        Collective: every rank must call it.
        """
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank.

        Collective: every rank must call it. All flags are reduced together.
        """
        if self.group is None:
            return list(flags)
        reduced = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(reduced, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in reduced]

    def concat(self, rows: Tensor) -> tuple[Tensor, int]:
        """Concatenate all ranks' rows [n, ...] in rank order; n may differ.

        Collective: every rank must call it.

        Returns:
            (rows of all ranks, index of this rank's first row).
        """
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
        """Return every rank's `value`, in rank order, on every rank.

        Collective: every rank must call it.
        """
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Broadcast rank 0's `value`. Collective: every rank must call it."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        return box[0]


def single_process() -> World:
    """Return a world of this process only, without a process group."""
    return World(0, 1, device_of_this_process(), None)


@contextmanager
def join_world(threads: int) -> Iterator[World]:
    """Join the process group that the environment describes, and leave it at the end.

    The environment sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. An existing group is used
    as it is. Without RANK, this is the only process; its group is not destroyed, because DeepSpeed
    keeps a reference to the first group of a process.

    Args:
        threads: CPU threads of this process.
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


def exit_now(code: int) -> NoReturn:
    """Exit this process at once, after flushing its output.

    While something references a process group (DeepSpeed's globals do), gloo's threads outlive
    `destroy_process_group`. They abort the interpreter while it shuts down, so that a finished rank
    counts as crashed. With torch 2.13, three ranks and busy cores, every fourth exit failed.
    """
    logging.shutdown()
    for output in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # The reader has exited.
            output.flush()
    os._exit(code)


def _join_from_environment(backend: str) -> None:
    store, rank, size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    # When torchrun restarts workers, its store still has the addresses of the dead ones.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"start-{start}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def device_of_this_process() -> torch.device:
    """Return this process's GPU, made current, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Ray shows a worker only its device; torchrun shows all devices and sets LOCAL_RANK.
    local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
