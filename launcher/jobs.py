"""Runs as jobs on a Ray cluster: this code, the user's modules and the config travel with them.

A job's driver is `gigabatch train` or `resume`, started by the cluster on its head node in a folder
that holds the config. It trains with workers of that same cluster; see `ray_workers`.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cluster import answers
from gigabatch.launcher.console import write
from gigabatch.launcher.signals import INTERRUPTED, REQUEUE
from gigabatch.launcher.start import resumed_config
from gigabatch.launcher.usercode import check_user_code
from gigabatch.launcher.wheel import build_wheel, wheel_version
from gigabatch.trainer.config import Config
from gigabatch.trainer.configfile import dump_config, parse_config, read_config, resolve
from gigabatch.trainer.runfolder import RunFolder

GRACE = 120  # seconds that a job gets to save a checkpoint when it is stopped
_POLL = 0.5  # seconds
_TRIES = 5
"""Connections lost in a row, with nothing new in between, before following is given up."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """What is sent: arguments of `gigabatch`, files of its working folder, modules of the user."""

    arguments: tuple[str, ...]
    files: dict[str, str]
    modules: tuple[Path, ...]
    label: str
    """What a list of jobs shows."""

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
    return Job(("train", name), files, _absolute(modules), config.run.name or stem)


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
    return Job(("resume", run, *overrides, *allows), {}, _absolute(modules), Path(run).name)


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
        folder = Path(name) / "work"
        folder.mkdir()
        (folder / "SUBMITTED").write_text(f"{job.label}\n")  # Ray takes no empty folder
        for file, text in job.files.items():
            (folder / file).write_text(text, encoding="utf-8")
        wheel = build_wheel(Path(name))
        runtime_env = {
            "working_dir": str(folder),
            "py_modules": [str(wheel), *map(str, job.modules)],
            "excludes": ["__pycache__"],
            "env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE)},
        }
        metadata = {"gigabatch": wheel_version(), "run": job.label}
        with answers("the job was not taken"), _all_files():
            return client.submit_job(
                entrypoint=job.entrypoint, runtime_env=runtime_env, metadata=metadata
            )


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


def follow(client: Any, job: str) -> int:
    """Print a job's log until it ends; the exit code of `gigabatch`. Ctrl-C leaves the job as it
    is."""
    try:
        asyncio.run(_tail(client, job))
    except KeyboardInterrupt:
        write(f"\n{job} goes on; this has only stopped following its log\n")
        return INTERRUPTED
    return outcome(client, job)


def outcome(client: Any, job: str) -> int:
    """The exit code of a job that has ended: its driver's own."""
    info = job_info(client, job)
    if info.status == "SUCCEEDED":
        write(f"{job} succeeded\n")
        return 0
    if info.status == "STOPPED":
        write(f"{job} was stopped\n")
        return REQUEUE
    code = info.driver_exit_code
    reason = (info.message or "no reason given").strip().splitlines()[0]
    print(f"gigabatch: {job} failed: {reason}", file=sys.stderr)
    return code if code and code > 0 else 1


async def _tail(client: Any, job: str) -> None:
    """Ray's server sends the whole log anew with each connection: what was shown is left out."""
    import aiohttp

    shown, tries = 0, 0
    while True:
        info = job_info(client, job)
        if info.status == "PENDING":
            await asyncio.sleep(_POLL)
            continue
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                if new := text[max(0, shown - seen) :]:
                    write(new)
                    tries = 0
                seen += len(text)
                shown = max(shown, seen)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            last: Exception | None = error
        else:
            last = None
        if job_info(client, job).status in _ENDED:
            break
        tries += 1
        if tries > _TRIES:
            raise GigabatchError(
                f"{job}: its log cannot be followed any more ({last or 'the connection closed'}). "
                "The job itself is not touched; `gigabatch jobs status` says how it is."
            )
        await asyncio.sleep(_POLL * 2**tries)
    _rest(client, job, shown)


def _rest(client: Any, job: str, shown: int) -> None:
    """What the log got after the last line that was sent."""
    if text := job_logs(client, job)[shown:]:
        write(text)


def stop(client: Any, job: str) -> str:
    """Ask a job to stop, wait until it has, and return its status. It saves a checkpoint first,
    and is killed when that takes more than GRACE seconds."""
    if (status := job_info(client, job).status) in _ENDED:
        return str(status)
    with answers(job):
        client.stop_job(job)
    deadline = time.monotonic() + GRACE + 30
    while time.monotonic() < deadline:
        if (status := job_info(client, job).status) in _ENDED:
            return str(status)
        time.sleep(_POLL)
    raise GigabatchError(f"{job}: still {status} {GRACE + 30} s after it was asked to stop.")


def job_info(client: Any, job: str) -> Any:
    """Ray's `JobDetails`. Raises GigabatchError where there is no such job."""
    if not _ID.fullmatch(job):
        raise GigabatchError(f"{job!r} is no job's id; `gigabatch jobs list` shows them.")
    with answers(job):
        return client.get_job_info(job)


def job_logs(client: Any, job: str) -> str:
    """All that a job has printed."""
    job_info(client, job)
    with answers(job):
        return client.get_job_logs(job)


def list_jobs(client: Any) -> list[Any]:
    """Ray's `JobDetails` of all submitted jobs, oldest first."""
    with answers("the list of jobs"):
        jobs = client.list_jobs()
    return sorted((j for j in jobs if j.submission_id), key=lambda j: j.start_time or 0)
