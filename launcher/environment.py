"""Facts about the environment in which this process was started."""

from __future__ import annotations

import os


def in_ray_job() -> bool:
    """Return whether a Ray cluster started this process as the driver of a job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "RAY_ADDRESS" in os.environ
