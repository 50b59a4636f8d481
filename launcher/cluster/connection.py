"""HTTP connection to a Ray cluster.

Whoever reaches a cluster's Jobs API runs any code on it (CVE-2023-48022), so a cluster beyond this
machine is spoken to with its token or not at all. The token goes into the request's header alone:
never into a message, a log or a job's description.
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

TIMEOUT = 10.0  # seconds for a cluster's first answer
_HOW = (
    "Set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN, in a file that "
    "RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token."
)


def connect(address: str, insecure: bool = False) -> Any:
    """A `ray.job_submission.JobSubmissionClient` of the cluster whose dashboard is at `address`
    (`http://HEAD:8265`). Raises GigabatchError where it cannot be reached, wants another token, or
    lies beyond this machine and no token is set (unless `insecure`)."""
    url = _checked(address)
    token = auth_token()
    mode = os.environ.get("RAY_AUTH_MODE") == "token"
    if mode and not token:
        raise GigabatchError(f"RAY_AUTH_MODE=token is set, but no token was found. {_HOW}")
    if not (mode or insecure or _is_loopback(url)):
        raise GigabatchError(
            f"{url}: refused without token authentication: an open cluster runs anybody's code. "
            f"{_HOW} For a cluster without tokens on a network that you trust, say --insecure."
        )
    _greet(url, token if mode else None)
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # whose import sets them to INFO
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    with answers(url):
        return JobSubmissionClient(url)


def auth_token() -> str | None:
    """The token that Ray would send, from the same places in the same order."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise GigabatchError(f"{path}: the cluster's token cannot be read: {error}.") from error


@contextmanager
def answers(where: str) -> Iterator[None]:
    """What the Jobs API refuses, or a lost connection, as a GigabatchError."""
    import requests
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, ValueError, RayError, ConnectionError) as error:
        raise GigabatchError(f"{where}: {_first_line(error)}") from error
    except requests.RequestException as error:
        raise GigabatchError(f"{where}: the connection failed: {_first_line(error)}") from error


def _checked(address: str) -> str:
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
        parts.port  # noqa: B018  raises where it is no number
    except ValueError:
        sound = False
    if not sound:
        raise GigabatchError(
            f"--address {address}: the address of a cluster's dashboard is needed, such as "
            "http://HEAD:8265 (not ray://, and not the port 6379 of its own traffic)."
        )
    return url


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _greet(url: str, token: str | None) -> None:
    """Ask for the version, in a few seconds: Ray's own client would wait for ever for a host that
    does not answer, and says little of a token."""
    import requests

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        reply = requests.get(f"{url}/api/version", headers=headers, timeout=TIMEOUT)
    except requests.RequestException as error:
        raise GigabatchError(
            f"{url}: no cluster answers there ({type(error).__name__}). Is it running, and is this "
            "the address of its dashboard, with port 8265 unless it was set otherwise?"
        ) from error
    if reply.status_code == 401:
        raise GigabatchError(f"{url}: the cluster wants a token (401). {_HOW}")
    if reply.status_code == 403:
        raise GigabatchError(
            f"{url}: the cluster refuses this token (403). Ask whoever runs it for the right one. "
            f"{_HOW}"
        )
    if reply.status_code != 200 or "ray_version" not in reply.text:
        raise GigabatchError(
            f"{url}: what answers there is no Ray dashboard (status {reply.status_code})."
        )


def _first_line(error: Exception) -> str:
    """Ray puts a server's traceback into its messages; the last line of it is the reason."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1].strip()
    return lines[0].strip() if lines else type(error).__name__
