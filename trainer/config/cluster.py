"""Where a run runs, and what it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gigabatch.data.settings import Settings
from gigabatch.trainer.config.fields import Amount, Count

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


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
    workers: Count = 2
    """Ranks, one a device."""
    threads: Amount = 0
    """CPU threads of each worker; 0: this machine's cores shared out. Pinned when the run starts,
    since gradients differ in the last bit between thread counts."""
    max_restarts: Amount = 3
    """ray, torchrun: how often a failed group of workers is started again."""
    grace_s: float = Field(120.0, gt=0)
    """After SIGTERM, SIGUSR1 or SIGUSR2 (exit code 75: start it again) or Ctrl-C (130), the step in
    progress and its checkpoint have so many seconds; then the run is left with its last
    checkpoint. Set it below what the scheduler gives (SIGKILL comes 30 s after SIGTERM from a
    torchrun of your own, and in Slurm by default)."""
