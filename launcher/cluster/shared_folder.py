"""Whether every node of a cluster sees the run folder: workers write there, wherever they run."""

from __future__ import annotations

import os
import platform
import time
import uuid
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError

WAIT = 60.0  # seconds for all nodes' answers, which start a process on each
_LAG = 5.0  # seconds that a network file system may take to show a new file


def check_shared(folder: Path) -> None:
    """Let each node of the cluster that this process has joined read and write a file in `folder`.
    Raises GigabatchError that names the nodes which cannot."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    word = uuid.uuid4().hex
    probe = folder / f".probe-{word}"
    probe.write_text(word)
    try:
        asked = {node["NodeID"]: _ask(node["NodeID"], str(probe), word) for node in nodes}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=WAIT)
        faults = [
            f"  {node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {fault}"
            for node in nodes
            if (fault := _fault(asked[node["NodeID"]], probe, node["NodeID"], word))
        ]
    finally:
        for path in folder.glob(f".probe-{word}*"):
            path.unlink(missing_ok=True)
    if faults:
        told = "\n".join(faults)
        raise GigabatchError(
            f"run.dir: {folder.parent} is not the same folder on every node of the cluster:\n"
            f"{told}\nSet run.dir to a folder of a file system that all nodes mount at the same "
            f"path. (The run's folder {folder} stays, on {platform.node()}.)"
        )


def _ask(node: str, probe: str, word: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return (
        ray.remote(_answer)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        .remote(probe, word, node)
    )


def _answer(probe: str, word: str, node: str) -> str | None:
    """On a node: read the driver's file and write one of its own; what went wrong."""
    if _reads(Path(probe)) != word:
        return "does not see what the driver wrote there"
    try:
        with open(f"{probe}.{node}", "x", encoding="utf-8") as file:
            file.write(word)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot write there: {error.strerror}"
    return None


def _fault(answer: Any, probe: Path, node: str, word: str) -> str | None:
    import ray

    try:
        if fault := ray.get(answer, timeout=0):
            return str(fault)
    except ray.exceptions.GetTimeoutError:
        return f"did not answer within {WAIT:.0f} s"
    except ray.exceptions.RayError as error:
        return f"did not answer: {str(error).splitlines()[0]}"
    if _reads(Path(f"{probe}.{node}")) != word:
        return "what it writes there does not reach the driver"
    return None


def _reads(path: Path) -> str | None:
    deadline = time.monotonic() + _LAG
    while True:
        try:
            if text := path.read_text(encoding="utf-8"):
                return text
        except OSError:
            pass
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
