"""What is told of a job that failed, by Ray's own details of it."""

from __future__ import annotations

from typing import Any

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType

from gigabatch.launcher.cluster.job_status import outcome

NEVER_BEGAN = (
    "runtime_env setup failed: Failed to set up runtime environment.\n"
    "Failed to download file:///wheel: No space left on device"
)
FELL = "Job entrypoint command failed with exit code 2, last available logs:\nstep 1\nstep 2"


class Server:
    """Answers as a cluster's job server would, of one job."""

    def __init__(self, **details: Any) -> None:
        known = {"type": JobType.SUBMISSION, "entrypoint": "train", "status": "FAILED"}
        self.details = JobDetails(**known | details)

    def get_job_info(self, job: str) -> JobDetails:
        return self.details


@pytest.mark.parametrize(("message", "code", "ends", "told"), [
    (NEVER_BEGAN, None, 1, NEVER_BEGAN),
    (FELL, 2, 2, FELL.splitlines()[0]),  # its log was shown
    ("  ", None, 1, "no reason given"),
    (None, None, 1, "no reason given"),
])  # fmt: skip
def test_a_failed_job_is_told_with_all_of_its_reason(
    message: str | None, code: int | None, ends: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(Server(message=message, driver_exit_code=code), "a") == ends
    assert capsys.readouterr().err == f"gigabatch: a failed: {told}\n"
