"""Jobs of a Ray cluster, once they are submitted: their list, log, outcome, and end."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cluster.connection import answers
from gigabatch.launcher.output import write
from gigabatch.launcher.signals import INTERRUPTED, REQUEUE

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Of a job's environment: seconds from its SIGTERM to SIGKILL."""
STOP_S = 150  # where that does not say
_POLL = 0.5  # seconds
_TRIES = 5
"""Connections lost in a row, with nothing new in between, before following is given up."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


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
    reason = (info.message or "").strip() or "no reason given"
    if code is not None:
        reason = reason.splitlines()[0]  # what follows is the log's end, which was shown
    print(f"gigabatch: {job} failed: {reason}", file=sys.stderr)
    return code if code and code > 0 else 1


async def _tail(client: Any, job: str) -> None:
    """Ray's server sends the whole log anew with each connection: what was shown is left out."""
    import aiohttp

    job_info(client, job)  # raises where there is no such job; later on a fault is the network's
    shown, tries = 0, 0
    while True:
        lost: Exception | str = "the connection closed"
        seen = 0
        try:
            status = job_info(client, job).status
            if status in _ENDED:
                break
            if status == "PENDING":
                await asyncio.sleep(_POLL)
                continue
            async for text in client.tail_job_logs(job):
                if new := text[max(0, shown - seen) :]:
                    write(new)
                    tries = 0
                seen += len(text)
                shown = max(shown, seen)
            if job_info(client, job).status in _ENDED:
                break
        except (GigabatchError, RuntimeError, OSError, aiohttp.ClientError) as error:
            lost = error
        tries += 1
        if tries > _TRIES:
            raise GigabatchError(
                f"{job}: its log cannot be followed any more ({lost}). The job itself is not "
                "touched; `gigabatch jobs status` says how it is."
            )
        await asyncio.sleep(_POLL * 2**tries)
    _rest(client, job, shown)


def _rest(client: Any, job: str, shown: int) -> None:
    """What the log got after the last line that was sent."""
    if text := job_logs(client, job)[shown:]:
        write(text)


def stop(client: Any, job: str) -> str:
    """Ask a job to stop, wait until it has, and return its status. It saves a checkpoint first,
    and is killed when that takes more than its STOP_WAIT."""
    info = job_info(client, job)
    if (status := info.status) in _ENDED:
        return str(status)
    wait = float(((info.runtime_env or {}).get("env_vars") or {}).get(STOP_WAIT, STOP_S)) + 30
    with answers(job):
        client.stop_job(job)
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        if (status := job_info(client, job).status) in _ENDED:
            return str(status)
        time.sleep(_POLL)
    raise GigabatchError(f"{job}: still {status} {wait:g} s after it was asked to stop.")


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
