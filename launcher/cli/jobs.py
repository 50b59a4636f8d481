"""`gigabatch submit` and `gigabatch jobs ...`: runs as jobs of a Ray cluster."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.output import write
from gigabatch.launcher.recipes import find_config

jobs = typer.Typer(
    help="List, show and stop jobs of a Ray cluster.\n\n"
    "A cluster beyond this machine needs its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
    "(or RAY_AUTH_TOKEN_PATH).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Address = Annotated[
    str,
    typer.Option(metavar="URL", help="URL of the cluster's dashboard, such as http://HEAD:8265."),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Allow a cluster beyond this machine without a token."),
]
JobId = Annotated[
    str, typer.Argument(metavar="ID", help="Job ID, as printed by `submit` and `jobs list`.")
]


def submit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG|KEY=VALUE",
            help="CONFIG and settings, as for `train`; with --resume only settings.",
        ),
    ] = None,
    address: Address = ...,  # type: ignore[assignment]
    modules: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="PATH",
            help="Python file or package folder to send with the job, for code that the config "
            "names as package.mod:Class. Repeatable.",
            exists=True,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Continue this run: the absolute path of its folder on the cluster."
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="With --resume: accept a changed value of this key. Repeatable."
        ),
    ] = None,
    no_follow: Annotated[
        bool, typer.Option("--no-follow", help="Exit once the cluster accepts the job.")
    ] = False,
    insecure: Insecure = False,
) -> int:
    """Train on a Ray cluster, as a job.

    Checks CONFIG and the modules that it names, sends them with this version of gigabatch, and
    prints the job's log. On several nodes run.dir must be a folder that all of them share. Ctrl-C
    ends only the log; the job continues.

    Exit codes are those of `train`, and 75 after `gigabatch jobs stop`.

    \b
    Examples:
      gigabatch submit my.yaml train.steps=1000 --address http://HEAD:8265 --with my_towers.py
      gigabatch submit --resume /shared/runs/my-001 --address http://HEAD:8265
    """
    overrides, config = list(arguments or []), None
    if not resume:
        if allow:
            raise GigabatchError("--allow needs --resume RUN.")
        if not overrides or "=" in overrides[0]:
            raise GigabatchError("submit needs a CONFIG, or --resume RUN.")
        config = find_config(overrides.pop(0))

    from gigabatch.launcher.cluster import submit as api
    from gigabatch.launcher.cluster.connection import connect
    from gigabatch.launcher.cluster.job_status import follow

    if config:
        job = api.train_job(config, overrides, modules or [])
    else:
        job = api.resume_job(str(resume), overrides, allow or [], modules or [])
    client = connect(address, insecure)
    job_id = api.submit(client, job)
    options = f"{job_id} --address {shlex.quote(address)}{' --insecure' if insecure else ''}"
    write(
        f"submitted {job_id}\n"
        f"  log: gigabatch jobs logs --follow {options}\n"
        f"  stop: gigabatch jobs stop {options}\n"
    )
    return 0 if no_follow else follow(client, job_id)


@jobs.command("list")
def list_(address: Address, insecure: Insecure = False) -> None:
    """List all jobs of the cluster, oldest first."""
    from gigabatch.launcher.cluster.connection import connect
    from gigabatch.launcher.cluster.job_status import list_jobs

    rows = [("id", "status", "started", "run", "code")]
    for job in list_jobs(connect(address, insecure)):
        metadata = job.metadata or {}
        run, code = metadata.get("run", "-"), metadata.get("gigabatch", "-")
        rows.append((job.submission_id, str(job.status.value), _time(job.start_time), run, code))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        write("  ".join(cell.ljust(width) for cell, width in cells).rstrip() + "\n")


@jobs.command()
def status(job: JobId, address: Address, insecure: Insecure = False) -> None:
    """Show one job: status and reason, command, times, exit code."""
    from gigabatch.launcher.cluster.connection import connect
    from gigabatch.launcher.cluster.job_status import job_info

    info = job_info(connect(address, insecure), job)
    rows: dict[str, Any] = {
        "status": info.status.value,
        "message": (info.message or "").strip(),
        "command": info.entrypoint,
        "started": _time(info.start_time),
        "ended": _time(info.end_time),
        "exit code": "-" if info.driver_exit_code is None else info.driver_exit_code,
        **(info.metadata or {}),
    }
    for name, value in rows.items():
        write(f"{name + ':':<11}{value}\n")


@jobs.command()
def logs(
    job: JobId,
    address: Address,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Print until the job ends; exit with the job's exit code."),
    ] = False,
    insecure: Insecure = False,
) -> int:
    """Print a job's log."""
    from gigabatch.launcher.cluster import job_status as api
    from gigabatch.launcher.cluster.connection import connect

    client = connect(address, insecure)
    if follow:
        return api.follow(client, job)
    write(api.job_logs(client, job))
    return 0


@jobs.command()
def stop(job: JobId, address: Address, insecure: Insecure = False) -> None:
    """Stop a job gracefully, with a checkpoint; wait until it has ended."""
    from gigabatch.launcher.cluster import job_status as api
    from gigabatch.launcher.cluster.connection import connect

    write(f"{job} is {api.stop(connect(address, insecure), job)}\n")


def _time(milliseconds: int | None) -> str:
    if not milliseconds:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000))
