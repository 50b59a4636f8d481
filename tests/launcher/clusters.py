"""Ray clusters for tests: nodes as processes, requests to their dashboard."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import psutil
import pytest
from support import Command

TOKEN = "a-secret-of-this-cluster-0123456789"


@dataclass
class Cluster:
    address: str
    gcs: str
    environment: dict[str, str]
    """Environment variables of its nodes."""

    def client(self, token: str | None = TOKEN) -> dict[str, str]:
        """Return the environment of a process that connects to the cluster."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return inherited | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {})


def node_environment(home: Path) -> dict[str, str]:
    """Return the nodes' environment, with token authentication; `home` is their user's home."""
    (home / "token").write_text(TOKEN)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    return inherited | {
        "HOME": str(home),
        "GIGABATCH_CACHE": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def ray_node(
    options: list[str], environment: dict[str, str], log: Path, *prefix: str, cpus: int = 2
) -> Any:
    return _Node(
        [
            *prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
            f"--num-cpus={cpus}", "--object-store-memory=100000000", "--disable-usage-stats",
            "--min-worker-port=0", "--max-worker-port=0", *options,
        ],
        environment,
        log,
    )  # fmt: skip


class _Node:
    """Runs `ray start --block`; leaving the context kills all of its processes."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.arguments = (command, environment, log)

    def __enter__(self) -> psutil.Process:
        command, environment, log = self.arguments
        with open(log, "wb") as output:
            process = psutil.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.process = process
        return process

    def __exit__(self, *_: object) -> None:
        processes = [*self.process.children(recursive=True), self.process]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(processes, timeout=10)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for server in sockets:
        server.bind(("127.0.0.1", 0))
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def ask(cluster: Cluster, path: str) -> Any:
    request = urllib.request.Request(f"{cluster.address}{path}")
    request.add_header("Authorization", f"Bearer {TOKEN}")
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def serves(cluster: Cluster) -> bool:
    try:
        ask(cluster, "/api/jobs/")
    except (URLError, OSError):
        return False
    return True


def wait_until(
    condition: Callable[[], Any],
    description: str,
    log: Path | None = None,
    by: Command | None = None,
    limit: float = 240,
) -> Any:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and (by is None or by.process.poll() is None):
        if result := condition():
            return result
        time.sleep(0.1)
    output = log.read_text() if log else ""
    if by:
        by.kill()
        output += "".join(by.process.communicate())
    return pytest.fail(f"not within {limit:.0f} s: {description}\n{output}")
