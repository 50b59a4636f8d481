"""Config sections `run` and `cluster`: name and folder of a run, its seed, and its workers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gigabatch.data.settings import Settings
from gigabatch.trainer.fields import Amount

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LAUNCHER_VARIABLES = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}
"""Environment variables that the launchers set for each worker."""


def _workers(value: Any) -> Any:
    """Accept a number or a range; a range with equal ends becomes a number."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if len(numbers) not in (1, 2) or not all(type(n) is int and n >= 1 for n in numbers):
        raise ValueError(
            "set a number of workers of at least 1, or a range [minimum, maximum], such as [2, 8]"
        )
    low, high = numbers[0], numbers[-1]
    if low > high:
        raise ValueError(f"set a range as [minimum, maximum]; {low} is more than {high}")
    return low if low == high else (low, high)


def _strings(value: Any) -> Any:
    """Convert numbers to strings: YAML reads 1 as a number, but variables are strings."""
    if not isinstance(value, dict):
        return value
    return {k: str(v) if type(v) in (int, float) else v for k, v in value.items()}


class RunSettings(Settings):
    """Name, folder and seed of a run."""

    name: Annotated[str, Field(pattern=NAME, max_length=100, coerce_numbers_to_str=True)] | None = (
        None
    )
    """Name of the run's folder inside `run.dir`. Unset: a new name, made from the config file's
    name and a number."""
    dir: Path = Path("runs")
    """Folder that contains the run folders. On several nodes it must be a path that all nodes
    share."""
    seed: int = Field(0, ge=0, lt=1 << 62, strict=True)
    """Seed for weights, sample order, augmentation and dropout."""


class ClusterSettings(Settings):
    """Launcher and workers of a run."""

    launcher: Literal["ray", "torchrun", "inline"] = "ray"
    """Program that starts the workers. ray: Ray Train, which also restarts them. torchrun: torch's
    own launcher. inline: this process, as a single worker."""
    workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 2
    """Number of workers, one per device. With launcher ray also a range [minimum, maximum]:
    training uses as many as the cluster has room for, and resumes from the last checkpoint with
    fewer or more when nodes leave or join. The samples of each step stay the same."""
    threads: Amount = 0
    """CPU threads per worker. 0: this machine's cores divided by the workers. The number is fixed
    when the run starts, because gradients differ in the last bits between thread counts."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray reserves per worker, including its loader processes."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1, strict=True)] | None = None
    """GPUs that Ray reserves per worker, 0 or 1. Unset: 1 if the cluster has GPUs."""
    placement: Literal["pack", "spread", "one_per_node", "one_node"] = "pack"
    """Distribution of Ray's workers over nodes. pack: as few nodes as possible. spread: as many as
    possible. one_per_node: never two on a node. one_node: all on the same node."""
    env: Annotated[dict[str, str], BeforeValidator(_strings)] = Field(default_factory=dict)
    """Environment variables of the workers, such as {NCCL_SOCKET_IFNAME: eth0}. The run folder
    shows them, so they must not contain secrets. With launcher inline they are set after Python has
    started, too late for OMP_*."""
    max_restarts: Amount = 3
    """Restarts of a failed group of workers without a new checkpoint in between, after 1, 2, 4, ...
    seconds (launcher ray or torchrun). A new checkpoint resets the count."""
    start_timeout_s: float = Field(60.0, gt=0)
    """Seconds that Ray may take to place and start a group of workers. Ray may wait this long for a
    node that was just lost."""
    resize_every_s: float = Field(1800.0, gt=0)
    """Seconds between two checks for room for more workers, if `workers` is a range. Growing
    repeats the steps since the last checkpoint, so set it to several checkpoint intervals."""
    grace_s: float = Field(120.0, gt=0)
    """Seconds for the step in progress and its checkpoint after SIGTERM, SIGUSR1 or SIGUSR2 (exit
    code 75: start again) or Ctrl-C (exit code 130). After them the run ends with its last
    checkpoint. Set it below the scheduler's limit: Slurm, and a torchrun that you start yourself,
    send SIGKILL 30 s after SIGTERM by default."""

    @property
    def min_workers(self) -> int:
        """Minimum number of workers with which the run trains."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Maximum number of workers with which the run trains."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def worker_env(self) -> dict[str, str]:
        """Environment variables of each worker, set before its Python starts."""
        return {"OMP_NUM_THREADS": str(self.threads), **self.env}

    @model_validator(mode="after")
    def _launcher_fits(self) -> Self:
        if self.launcher == "inline" and self.workers != 1:
            raise ValueError(
                "cluster.launcher=inline runs a single worker; set cluster.workers=1, or use "
                "torchrun"
            )
        if self.launcher != "ray" and self.min_workers < self.max_workers:
            raise ValueError(
                f"cluster.launcher={self.launcher} needs a fixed number of workers; set "
                f"cluster.workers={self.max_workers}, or cluster.launcher=ray"
            )
        return self

    @model_validator(mode="after")
    def _environment_fits(self) -> Self:
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"cluster.env: {name!r} is not a valid name of a variable")
            if name in LAUNCHER_VARIABLES:
                raise ValueError(f"cluster.env: the launcher sets {name} itself; remove it")
            if re.search(r"TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|_KEY$", name.upper()):
                raise ValueError(
                    f"cluster.env: {name} looks like a secret, and the run folder shows it; set "
                    "it on the nodes instead"
                )
        return self
