"""HTTP connection to a Ray cluster.

Anyone who can reach a cluster's Jobs API can run code on it (CVE-2023-48022). A cluster on another
machine is therefore accessed only with a token, unless the user opts out. The token appears only in
request headers, never in a message, a log or a job's description.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gigabatch.data.errors import GigabatchError

TIMEOUT = 10.0
"""Seconds to wait for a cluster's first response."""
_TOKEN_HELP = (
    "Set RAY_AUTH_MODE=token, and provide the cluster's token in RAY_AUTH_TOKEN, in the file named "
    "by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token."
)


def connect(address: str, insecure: bool = False) -> Any:
    """Connect to a cluster's Jobs API.

    Args:
        address: Address of the cluster's dashboard, such as `http://HEAD:8265`.
        insecure: Allow a cluster on another machine without a token.

    Returns:
        A `ray.job_submission.JobSubmissionClient`.

    Raises:
        GigabatchError: if the cluster cannot be reached, rejects the token, or is on another
            machine and no token is set.
    """
    url = _dashboard_url(address)
    token = auth_token()
    use_token = os.environ.get("RAY_AUTH_MODE") == "token"
    if use_token and not token:
        raise GigabatchError(f"RAY_AUTH_MODE=token is set, but no token was found. {_TOKEN_HELP}")
    if not (use_token or insecure or _is_loopback(url)):
        raise GigabatchError(
            f"{url}: this cluster is on another machine, but token authentication is off; without "
            f"it, anyone can run code on the cluster. {_TOKEN_HELP} If the cluster has no tokens "
            "and you trust the network, use --insecure."
        )
    _check_dashboard(url, token if use_token else None)
    from ray.job_submission import JobSubmissionClient

    # Importing these Ray modules sets their log level to INFO.
    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    with translate_errors(url):
        return JobSubmissionClient(url)


def auth_token() -> str | None:
    """Return the token that Ray would send; None if there is none.

    The sources and their order are Ray's.

    Raises:
        GigabatchError: if the token file cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    configured = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(configured) if configured else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise GigabatchError(f"{path}: cannot read the cluster's token: {error}.") from error


@contextmanager
def translate_errors(subject: str) -> Iterator[None]:
    """Convert errors of the Jobs API and of the connection to a GigabatchError about `subject`."""
    import requests
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, ValueError, RayError, ConnectionError) as error:
        raise GigabatchError(f"{subject}: {_reason(error)}") from error
    except requests.RequestException as error:
        raise GigabatchError(f"{subject}: the connection failed: {_reason(error)}") from error


def _dashboard_url(address: str) -> str:
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
        parts.port  # noqa: B018  Raises ValueError if the port is not a number.
    except ValueError:
        valid = False
    if not valid:
        raise GigabatchError(
            f"--address {address}: this is not a dashboard address. Use the form http://HEAD:8265 "
            "(not ray://, and not port 6379, which Ray uses internally)."
        )
    return url


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_dashboard(url: str, token: str | None) -> None:
    """Request Ray's version with a timeout.

    Ray's client would wait forever for a host that does not respond, and its messages about tokens
    are vague.
    """
    import requests

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        response = requests.get(f"{url}/api/version", headers=headers, timeout=TIMEOUT)
    except requests.RequestException as error:
        raise GigabatchError(
            f"{url}: no cluster responds ({type(error).__name__}). Check that it is running, and "
            "that this is the address of its dashboard (port 8265 by default)."
        ) from error
    if response.status_code == 401:
        raise GigabatchError(f"{url}: the cluster requires a token (401). {_TOKEN_HELP}")
    if response.status_code == 403:
        raise GigabatchError(
            f"{url}: the cluster rejects this token (403). Ask its administrator for a valid one. "
            f"{_TOKEN_HELP}"
        )
    if response.status_code != 200 or "ray_version" not in response.text:
        raise GigabatchError(
            f"{url}: the server is not a Ray dashboard (status {response.status_code}). Check "
            "--address."
        )


def _reason(error: Exception) -> str:
    """Return the line of a message that states the reason: the last one, if it has a traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1].strip()
    return lines[0].strip() if lines else type(error).__name__
