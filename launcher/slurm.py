"""Slurm integration: rank and world size of `srun gigabatch train ...` from Slurm's variables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, MutableMapping

from gigabatch.data.errors import GigabatchError

_FIRST_PORT, _PORTS = 10_000, 20_000  # below the range from which systems assign ports


def join_slurm_step(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set the distributed variables of one task of a multi-task `srun`.

    Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Nothing is set in a batch script
    or a single task, because these start workers themselves. (In Slurm, the process of a batch
    script is task 0 of all tasks, but has no step ID.)

    Args:
        environment: Environment variables to read and to change.

    Returns:
        True if the variables were set.

    Raises:
        GigabatchError: if Slurm's list of hosts cannot be parsed.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment:
        return False
    get = environment.get
    size = get("SLURM_STEP_NUM_TASKS") or get("SLURM_NTASKS", "1")
    rank, local_rank = get("SLURM_PROCID"), get("SLURM_LOCALID")
    if size == "1" or rank is None or local_rank is None:
        return False
    hosts = get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST", "")
    variables = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": size}
    if "MASTER_ADDR" not in environment:
        variables["MASTER_ADDR"] = expand_hosts(hosts)[0]
    if "MASTER_PORT" not in environment:
        # All tasks of a step compute the same port; the job's next step gets a different one.
        number = int(get("SLURM_JOB_ID", "0")) * 16 + int(environment["SLURM_STEP_ID"])
        variables["MASTER_PORT"] = str(_FIRST_PORT + number % _PORTS)
    environment.update(variables)
    return True


def expand_hosts(text: str) -> list[str]:
    """Expand a Slurm host list such as `login,node[01-03,7]-ib`, in order.

    Raises:
        GigabatchError: if the text is not a host list.
    """
    hosts = [host for entry in _entries(text) for host in _expand(entry)]
    if not hosts:
        raise _not_a_list(text)
    return hosts


def _entries(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    entries = re.findall(r"(?:[^,\[\]]|\[[\d,-]+\])+", text)
    if ",".join(entries) != text:
        raise _not_a_list(text)
    return entries


def _expand(entry: str) -> Iterator[str]:
    """Yield the hosts of one entry; brackets may occur several times."""
    head, bracket, rest = entry.partition("[")
    if not bracket:
        yield head
        return
    ranges, _, tail = rest.partition("]")
    for text in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not match:
            raise _not_a_list(entry)
        first, last = match[1], match[2] or match[1]
        for number in range(int(first), int(last) + 1):
            for suffix in _expand(tail):
                yield f"{head}{number:0{len(first)}d}{suffix}"


def _not_a_list(text: str) -> GigabatchError:
    return GigabatchError(
        f"SLURM_JOB_NODELIST: {text!r} is not a list of hosts such as node[01-03,7]. Set "
        "MASTER_ADDR to the host of the first task."
    )
