"""A rank's place in the world from Slurm's own variables: `srun gigabatch train ...`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, MutableMapping

from gigabatch.data.errors import GigabatchError

_FIRST_PORT, _PORTS = 10_000, 20_000  # below those that systems hand out by themselves


def join_slurm_step(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Where this process is one of several tasks of an `srun` and has no RANK, set RANK,
    LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; whether it did.

    A batch script is left alone, as is a single task: they start workers. Slurm names a batch
    script's own process task 0 of all tasks, but gives it no step. Raises GigabatchError.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment:
        return False
    known = environment.get
    size = known("SLURM_STEP_NUM_TASKS") or known("SLURM_NTASKS", "1")
    rank, local = known("SLURM_PROCID"), known("SLURM_LOCALID")
    if size == "1" or rank is None or local is None:
        return False
    hosts = known("SLURM_STEP_NODELIST") or known("SLURM_JOB_NODELIST", "")
    found = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": size}
    if "MASTER_ADDR" not in environment:
        found["MASTER_ADDR"] = expand_hosts(hosts)[0]
    if "MASTER_PORT" not in environment:
        # The same for all tasks of a step, another for the next step of the job.
        number = int(known("SLURM_JOB_ID", "0")) * 16 + int(environment["SLURM_STEP_ID"])
        found["MASTER_PORT"] = str(_FIRST_PORT + number % _PORTS)
    environment.update(found)
    return True


def expand_hosts(text: str) -> list[str]:
    """The hosts of a Slurm list such as `login,node[01-03,7]-ib`, in order.

    Raises GigabatchError where it is not one.
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
    head, bracket, rest = entry.partition("[")
    if not bracket:
        yield head
        return
    ranges, _, tail = rest.partition("]")
    for each in ranges.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", each)
        if not found:
            raise _not_a_list(entry)
        first, last = found[1], found[2] or found[1]
        for number in range(int(first), int(last) + 1):
            for end in _expand(tail):
                yield f"{head}{number:0{len(first)}d}{end}"


def _not_a_list(text: str) -> GigabatchError:
    return GigabatchError(
        f"SLURM_JOB_NODELIST: {text!r} is not a list of hosts such as node[01-03,7]. Set "
        "MASTER_ADDR to the host of the first task."
    )
