"""`gigabatch submit` and `gigabatch jobs ...`: runs on a Ray cluster, from anywhere."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.output import write

jobs = typer.Typer(
    help="See and stop the jobs of a cluster. A cluster beyond this machine is reached with its "
    "token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Address = Annotated[
    str,
    typer.Option(metavar="URL", help="The cluster's dashboard, such as http://HEAD:8265."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Reach a cluster beyond this machine without a token.")
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As `submit` and `list` print it.")]


def submit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG [KEY=VALUE]...", help="As for `train`; no CONFIG to resume"),
    ] = None,
    address: Address = ...,  # type: ignore[assignment]
    modules: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="PATH",
            help="A .py file or a package's folder to send along: what the config names as "
            "`package.mod:name`. Repeat for several.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Go on with this run: its whole path on the cluster."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="With --resume: accept a change of this key."),
    ] = None,
    no_follow: Annotated[
        bool, typer.Option("--no-follow", help="Return when the job is taken.")
    ] = False,
    insecure: Insecure = False,
) -> int:
    """Train on a Ray cluster: sends this code and CONFIG there, and follows the log.

    The config and the modules that it names are checked first. On a cluster of several nodes
    run.dir must be a folder that all of them share. Ctrl-C stops following; the job goes on.
    Exit codes are those of `train`; 75 also after `gigabatch jobs stop`.

    \b
    gigabatch submit my.yaml train.steps=1000 --address http://HEAD:8265 --with my_towers.py
    gigabatch submit --resume /shared/runs/my-001 --address http://HEAD:8265
    """
    from gigabatch.launcher.cluster import submit as api
    from gigabatch.launcher.cluster.connection import connect
    from gigabatch.launcher.cluster.job_status import follow

    given, sent = arguments or [], modules or []
    if resume:
        job = api.resume_job(resume, given, allow or [], sent)
    elif allow:
        raise GigabatchError("--allow goes with --resume RUN.")
    elif not given or "=" in given[0]:
        raise GigabatchError("submit needs a CONFIG, or --resume RUN.")
    else:
        job = api.train_job(Path(given[0]), given[1:], sent)
    client = connect(address, insecure)
    name = api.submit(client, job)
    options = f"{name} --address {shlex.quote(address)}{' --insecure' if insecure else ''}"
    write(
        f"submitted {name}\n"
        f"  its log: gigabatch jobs logs --follow {options}\n"
        f"  stop it: gigabatch jobs stop {options}\n"
    )
    return 0 if no_follow else follow(client, name)


@jobs.command("list")
def list_(address: Address, insecure: Insecure = False) -> None:
    """List all jobs that the cluster knows, oldest first."""
    from gigabatch.launcher.cluster.connection import connect
    from gigabatch.launcher.cluster.job_status import list_jobs

    rows = [("id", "status", "started", "run", "code")]
    for job in list_jobs(connect(address, insecure)):
        told = job.metadata or {}
        run, code = told.get("run", "-"), told.get("gigabatch", "-")
        rows.append((job.submission_id, str(job.status.value), _time(job.start_time), run, code))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        write("  ".join(cell.ljust(width) for cell, width in cells).rstrip() + "\n")


@jobs.command()
def status(job: JobId, address: Address, insecure: Insecure = False) -> None:
    """Say how a job is: its state and the reason, its command, its times, its exit code."""
    from gigabatch.launcher.cluster.connection import connect
    from gigabatch.launcher.cluster.job_status import job_info

    info = job_info(connect(address, insecure), job)
    shown: dict[str, Any] = {
        "status": info.status.value,
        "message": (info.message or "").strip(),
        "command": info.entrypoint,
        "started": _time(info.start_time),
        "ended": _time(info.end_time),
        "exit code": "-" if info.driver_exit_code is None else info.driver_exit_code,
        **(info.metadata or {}),
    }
    for name, value in shown.items():
        write(f"{name + ':':<11}{value}\n")


@jobs.command()
def logs(
    job: JobId,
    address: Address,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until the job ends; exits as the job does.")
    ] = False,
    insecure: Insecure = False,
) -> int:
    """Print what a job has printed."""
    from gigabatch.launcher.cluster import job_status as api
    from gigabatch.launcher.cluster.connection import connect

    client = connect(address, insecure)
    if follow:
        return api.follow(client, job)
    write(api.job_logs(client, job))
    return 0


@jobs.command()
def stop(job: JobId, address: Address, insecure: Insecure = False) -> None:
    """Stop a job, with a checkpoint, and wait until it has ended."""
    from gigabatch.launcher.cluster import job_status as api
    from gigabatch.launcher.cluster.connection import connect

    write(f"{job} is {api.stop(connect(address, insecure), job)}\n")


def _time(milliseconds: int | None) -> str:
    if not milliseconds:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000))
