"""Runs as jobs on a Ray cluster: this code, the user's modules and the config travel with them.

A job's driver is `gigabatch train` or `resume`, started by the cluster on its head node in a folder
that holds the config. It trains with workers of that same cluster; see `ray_workers`.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cluster.connection import answers
from gigabatch.launcher.cluster.job_status import STOP_S, STOP_WAIT
from gigabatch.launcher.cluster.user_code import check_user_code
from gigabatch.launcher.cluster.wheel import build_wheel, wheel_version
from gigabatch.launcher.start import resumed_config
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import dump_config, parse_config, read_config, resolve
from gigabatch.trainer.run.folder import RunFolder

LEFT_HERE = shutil.ignore_patterns("__pycache__", ".git", ".env", ".env.*", ".netrc", "*.pem")
"""What of a folder does not travel with `--with`: no code, or secrets."""


@dataclass(frozen=True)
class Job:
    """What is sent: arguments of `gigabatch`, files of its working folder, modules of the user."""

    arguments: tuple[str, ...]
    files: dict[str, str]
    modules: tuple[Path, ...]
    label: str
    """What a list of jobs shows."""
    stop_s: int = STOP_S
    """Seconds that the cluster leaves it, once it is asked to stop, to save and end."""

    @property
    def entrypoint(self) -> str:
        """The command for the cluster's shell, which it replaces, so that a stop reaches it."""
        return "exec " + shlex.join(["python", "-m", "gigabatch.launcher", *self.arguments])


def train_job(path: Path, overrides: Sequence[str], modules: Sequence[Path]) -> Job:
    """A new run. Raises GigabatchError for whatever is wrong with the config or its modules."""
    config = portable(parse_config(read_config(path), str(path), overrides))
    check_user_code(config, modules)
    # `train` names the run after the file; its name is free of what a shell or Ray would read.
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip(".-") or "run"
    name = f"{stem}.yaml"
    files = {name: dump_config(config)}
    label, stop_s = config.run.name or stem, _stop_s(config)
    return Job(("train", name), files, _absolute(modules), label, stop_s)


def resume_job(
    run: str, overrides: Sequence[str], allow: Sequence[str], modules: Sequence[Path]
) -> Job:
    """Going on with a run; `run` is its folder, as the cluster's nodes name it."""
    if not run.startswith("/"):
        raise GigabatchError(
            f"--resume {run}: give the run's whole path, as the cluster's nodes see it; the job's "
            "log began with it."
        )
    here = RunFolder(Path(run))
    if (here.path / "config.yaml").exists():  # this machine shares the folder
        config = resumed_config(here, overrides, allow)
    else:
        config = parse_config("", "the command line", overrides)
    check_user_code(config, modules)
    allows = [f"--allow={key}" for key in allow]
    arguments = ("resume", run, *overrides, *allows)
    return Job(arguments, {}, _absolute(modules), Path(run).name, _stop_s(config))


def _stop_s(config: Config) -> int:
    """The run's own time for a clean end, and some for its processes to go."""
    return math.ceil(config.cluster.grace_s) + 30


def portable(config: Config) -> Config:
    """Resolved as far as this machine can: its number of cores says nothing of the cluster's."""
    threads = config.cluster.threads
    resolved = resolve(config)
    cluster = resolved.cluster.model_copy(update={"threads": threads})
    return resolved.model_copy(update={"cluster": cluster})


def _absolute(modules: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(path.absolute() for path in modules)


def submit(client: Any, job: Job) -> str:
    """Send a job with this very code; its submission id."""
    with tempfile.TemporaryDirectory(prefix="gigabatch-") as name:
        folder = _working_folder(job, Path(name) / "work")
        wheel = build_wheel(Path(name))
        runtime_env = {
            "working_dir": str(folder),
            "py_modules": [str(wheel)],
            "env_vars": {"PYTHONUNBUFFERED": "1", STOP_WAIT: str(job.stop_s)},
        }
        metadata = {"gigabatch": wheel_version(), "run": job.label}
        with answers("the job was not taken"), _all_files():
            return client.submit_job(
                entrypoint=job.entrypoint, runtime_env=runtime_env, metadata=metadata
            )


def _working_folder(job: Job, folder: Path) -> Path:
    """What the job's processes find where they start, which is on their Python path."""
    folder.mkdir()
    (folder / "SUBMITTED").write_text(f"{job.label}\n")  # Ray takes no empty folder
    for file, text in job.files.items():
        (folder / file).write_text(text, encoding="utf-8")
    for path in job.modules:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=LEFT_HERE)
        else:
            shutil.copy(path, folder)
    return folder


@contextmanager
def _all_files() -> Iterator[None]:
    """Ray would leave out what a .gitignore names: a module that is there must travel."""
    name = "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
