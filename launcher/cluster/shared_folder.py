"""Check that all nodes of a cluster share the run folder, to which every worker writes."""

from __future__ import annotations

import os
import platform
import time
import uuid
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError

TIMEOUT_S = 60.0
"""Seconds for all nodes to respond; each starts a process."""
_LAG_S = 5.0
"""Seconds that a network file system may take to show a new file."""


def check_shared(folder: Path) -> None:
    """Check that every node of the cluster can read and write files in `folder`.

    Raises:
        GigabatchError: if a node cannot; the message names these nodes.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    token = uuid.uuid4().hex
    probe = folder / f".probe-{token}"
    probe.write_text(token)
    try:
        tasks = {node["NodeID"]: _start_task(node["NodeID"], str(probe), token) for node in nodes}
        ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=TIMEOUT_S)
        problems = [
            f"  {node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {problem}"
            for node in nodes
            if (problem := _problem(tasks[node["NodeID"]], probe, node["NodeID"], token))
        ]
    finally:
        for path in folder.glob(f".probe-{token}*"):
            path.unlink(missing_ok=True)
    if problems:
        lines = "\n".join(problems)
        raise GigabatchError(
            f"run.dir: {folder.parent} is not shared by all nodes of the cluster:\n{lines}\n"
            "Set run.dir to a folder that all nodes mount at the same path. (The run folder "
            f"{folder} remains on {platform.node()}.)"
        )


def _start_task(node: str, probe: str, token: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return (
        ray.remote(_read_and_write)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        .remote(probe, token, node)
    )


def _read_and_write(probe: str, token: str, node: str) -> str | None:
    """On a node, read the driver's file and write a second one; return the problem, if any."""
    if _read(Path(probe)) != token:
        return "cannot see the driver's file"
    try:
        with open(f"{probe}.{node}", "x", encoding="utf-8") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot write to it: {error.strerror}"
    return None


def _problem(task: Any, probe: Path, node: str, token: str) -> str | None:
    """Return a node's problem, if any; also checks that its file reaches the driver."""
    import ray

    try:
        if problem := ray.get(task, timeout=0):
            return str(problem)
    except ray.exceptions.GetTimeoutError:
        return f"no response within {TIMEOUT_S:.0f} s"
    except ray.exceptions.RayError as error:
        return f"no response: {str(error).splitlines()[0]}"
    if _read(Path(f"{probe}.{node}")) != token:
        return "the driver cannot see its file"
    return None


def _read(path: Path) -> str | None:
    """Read a file that may appear late; None if it does not appear."""
    deadline = time.monotonic() + _LAG_S
    while True:
        try:
            if text := path.read_text(encoding="utf-8"):
                return text
        except OSError:
            pass
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
