"""Messages and exit codes for failed jobs, from Ray's job details."""

from __future__ import annotations

from typing import Any

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType

from gigabatch.launcher.cluster.job_status import outcome

NEVER_STARTED = (
    "runtime_env setup failed: Failed to set up runtime environment.\n"
    "Failed to download file:///wheel: No space left on device"
)
FAILED = "Job entrypoint command failed with exit code 2, last available logs:\nstep 1\nstep 2"


class Server:
    """A job server that knows one job."""

    def __init__(self, **details: Any) -> None:
        defaults = {"type": JobType.SUBMISSION, "entrypoint": "train", "status": "FAILED"}
        self.details = JobDetails(**defaults | details)

    def get_job_info(self, job: str) -> JobDetails:
        return self.details


@pytest.mark.parametrize(("message", "code", "exit_code", "reason"), [
    (NEVER_STARTED, None, 1, NEVER_STARTED),
    (FAILED, 2, 2, FAILED.splitlines()[0]),  # the other lines repeat the log, printed before
    ("  ", None, 1, "no reason given"),
    (None, None, 1, "no reason given"),
])  # fmt: skip
def test_failed_job_is_reported_with_its_full_reason(
    message: str | None,
    code: int | None,
    exit_code: int,
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outcome(Server(message=message, driver_exit_code=code), "a") == exit_code
    assert capsys.readouterr().err == f"gigabatch: a failed: {reason}\n"
