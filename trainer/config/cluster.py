"""Where a run runs, and what it is called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gigabatch.data.settings import Settings
from gigabatch.trainer.fields import Amount

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
OURS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Environment variables that the launchers set for each worker."""


def _workers(value: Any) -> Any:
    """A range of one number is that number; all that is neither is refused with one sentence."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if len(listed) not in (1, 2) or not all(type(each) is int and each >= 1 for each in listed):
        raise ValueError("a number of workers from 1, or a range [least, most], such as [2, 8]")
    if listed[0] > listed[-1]:
        raise ValueError(f"a range is [least, most], and {listed[0]} is more than {listed[-1]}")
    return listed[0] if listed[0] == listed[-1] else tuple(listed)


def _strings(value: Any) -> Any:
    """YAML reads 1 as a number; an environment holds text."""
    if not isinstance(value, dict):
        return value
    return {k: str(v) if type(v) in (int, float) else v for k, v in value.items()}


class RunSettings(Settings):
    name: Annotated[str, Field(pattern=NAME, max_length=100, coerce_numbers_to_str=True)] | None = (
        None
    )
    """The run's folder inside `run.dir`; unset takes a new one, named after the config file."""
    dir: Path = Path("runs")
    """Where run folders live; on several nodes, a path that all of them share."""
    seed: int = Field(0, ge=0, lt=1 << 62, strict=True)
    """Keys everything random: initial weights, order, augmentation, dropout."""


class ClusterSettings(Settings):
    launcher: Literal["ray", "torchrun", "inline"] = "ray"
    """ray: Ray Train starts and restarts the workers. torchrun: torch's own launcher. inline:
    this process, one worker."""
    workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 2
    """Ranks, one a device. ray: `[least, most]` trains on as many as there is room for, and goes on
    from the last checkpoint with fewer or more when nodes go or come; the batch and the samples
    of each step stay the same."""
    threads: Amount = 0
    """CPU threads of each worker; 0: this machine's cores shared out. Pinned when the run starts,
    since gradients differ in the last bit between thread counts."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """ray: CPUs of the cluster that each worker takes up, its loader processes included."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1, strict=True)] | None = None
    """ray: 1 or 0; unset: 1 where there are GPUs at all."""
    placement: Literal["pack", "spread", "one_per_node", "one_node"] = "pack"
    """ray: workers on as few nodes as possible; over as many as possible; never two on one node; or
    all on one."""
    env: Annotated[dict[str, str], BeforeValidator(_strings)] = Field(default_factory=dict)
    """Environment variables of the workers, such as {NCCL_SOCKET_IFNAME: eth0}; for no secrets,
    since the run folder shows them. (inline: set once Python is up, too late for OMP_*.)"""
    max_restarts: Amount = 3
    """ray, torchrun: how often a failed group of workers is started again without a new
    checkpoint between, after 1, 2, 4, ... seconds; a new checkpoint begins the count anew."""
    start_timeout_s: float = Field(60.0, gt=0)
    """ray: how long a group of workers may take to be placed and started. Ray may wait for so long
    for a node that has just been lost."""
    resize_every_s: float = Field(1800.0, gt=0)
    """ray, with a range of workers: how often to look whether there is room for more. Growing costs
    the steps since the last checkpoint, so let there be several between two looks."""
    grace_s: float = Field(120.0, gt=0)
    """After SIGTERM, SIGUSR1 or SIGUSR2 (exit code 75: start it again) or Ctrl-C (130), the step in
    progress and its checkpoint have so many seconds; then the run is left with its last
    checkpoint. Set it below what the scheduler gives (SIGKILL comes 30 s after SIGTERM from a
    torchrun of your own, and in Slurm by default)."""

    @property
    def least(self) -> int:
        """The fewest workers that train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """The most workers that train."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def worker_env(self) -> dict[str, str]:
        """What is set for each worker before its Python starts."""
        return {"OMP_NUM_THREADS": str(self.threads), **self.env}

    @model_validator(mode="after")
    def _launcher_fits(self) -> Self:
        if self.launcher == "inline" and self.workers != 1:
            raise ValueError(
                "cluster.launcher=inline is one worker; add cluster.workers=1, or take torchrun"
            )
        if self.launcher != "ray" and self.least < self.most:
            raise ValueError(
                f"cluster.launcher={self.launcher} trains on a fixed number of workers; give "
                f"cluster.workers={self.most}, or take cluster.launcher=ray"
            )
        return self

    @model_validator(mode="after")
    def _environment_fits(self) -> Self:
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"cluster.env: {name!r} is no name of an environment variable")
            if name in OURS:
                raise ValueError(f"cluster.env: {name} is set for each worker by its launcher")
            if re.search(r"TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|_KEY$", name.upper()):
                raise ValueError(
                    f"cluster.env: {name} looks like a secret, and the run folder shows this; set "
                    "it on the nodes"
                )
        return self
