"""Jobs of a Ray cluster: list, log, outcome, stop."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cluster.connection import translate_errors
from gigabatch.launcher.output import write
from gigabatch.launcher.signals import INTERRUPTED, REQUEUE

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Environment variable of a job: seconds between its SIGTERM and SIGKILL."""
STOP_S = 150
"""Default of the variable `STOP_WAIT`."""
_POLL_S = 0.5
_MAX_FAILURES = 5
"""Maximum consecutive connection failures without new output while a log is followed."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def follow(client: Any, job: str) -> int:
    """Print a job's log until the job ends; Ctrl-C stops printing but not the job.

    Args:
        client: Client of the cluster.
        job: Id of the job.

    Returns:
        Exit code of `gigabatch`.

    Raises:
        GigabatchError: if the job does not exist, or the connection fails repeatedly.
    """
    try:
        asyncio.run(_print_log(client, job))
    except KeyboardInterrupt:
        write(f"\nstopped following the log; {job} continues\n")
        return INTERRUPTED
    return outcome(client, job)


def outcome(client: Any, job: str) -> int:
    """Print how a job ended, and return its driver's exit code."""
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
        reason = reason.splitlines()[0]  # The rest repeats the end of the log.
    print(f"gigabatch: {job} failed: {reason}", file=sys.stderr)
    return code if code and code > 0 else 1


async def _print_log(client: Any, job: str) -> None:
    """Print a job's log until it ends, reconnecting after failures.

    On each connection Ray sends the log from its beginning, so the part already printed is skipped.
    """
    import aiohttp

    job_info(client, job)  # Raises if the job does not exist; later errors are connection failures.
    printed, failures = 0, 0
    while True:
        problem: Exception | str = "the connection closed"
        received = 0
        try:
            status = job_info(client, job).status
            if status in _ENDED:
                break
            if status == "PENDING":
                await asyncio.sleep(_POLL_S)
                continue
            async for text in client.tail_job_logs(job):
                if new := text[max(0, printed - received) :]:
                    write(new)
                    failures = 0
                received += len(text)
                printed = max(printed, received)
            if job_info(client, job).status in _ENDED:
                break
        except (GigabatchError, RuntimeError, OSError, aiohttp.ClientError) as error:
            problem = error
        failures += 1
        if failures > _MAX_FAILURES:
            raise GigabatchError(
                f"{job}: the connection to its log failed {failures} times ({problem}). The job "
                "itself is not affected; see `gigabatch jobs status`."
            )
        await asyncio.sleep(_POLL_S * 2**failures)
    # Print the lines written after the last one sent.
    if text := job_logs(client, job)[printed:]:
        write(text)


def stop(client: Any, job: str) -> str:
    """Request a graceful stop of a job and wait until it has ended.

    The job saves a checkpoint first; Ray kills it if that takes longer than its STOP_WAIT.

    Args:
        client: Client of the cluster.
        job: Id of the job.

    Returns:
        Status of the job.

    Raises:
        GigabatchError: if the job does not exist or does not end in time.
    """
    info = job_info(client, job)
    if (status := info.status) in _ENDED:
        return str(status)
    wait = float(((info.runtime_env or {}).get("env_vars") or {}).get(STOP_WAIT, STOP_S)) + 30
    with translate_errors(job):
        client.stop_job(job)
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        if (status := job_info(client, job).status) in _ENDED:
            return str(status)
        time.sleep(_POLL_S)
    raise GigabatchError(
        f"{job}: still {status} {wait:g} s after the stop request. Check `gigabatch jobs logs`."
    )


def job_info(client: Any, job: str) -> Any:
    """Return Ray's `JobDetails` of a job.

    Raises:
        GigabatchError: if the job does not exist.
    """
    if not _ID.fullmatch(job):
        raise GigabatchError(f"{job!r} is not a job id; `gigabatch jobs list` shows the ids.")
    with translate_errors(job):
        return client.get_job_info(job)


def job_logs(client: Any, job: str) -> str:
    """Return everything that a job has printed."""
    job_info(client, job)
    with translate_errors(job):
        return client.get_job_logs(job)


def list_jobs(client: Any) -> list[Any]:
    """Return Ray's `JobDetails` of all submitted jobs, oldest first."""
    with translate_errors("the list of jobs"):
        jobs = client.list_jobs()
    return sorted((j for j in jobs if j.submission_id), key=lambda j: j.start_time or 0)
