"""Processes of a torchrun run on this machine, found from its launcher's process."""

from __future__ import annotations

from contextlib import suppress

import psutil


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants; empty if it has ended."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def rank_processes(launcher: int) -> list[psutil.Process]:
    """Return the training processes of a `gigabatch` process, in rank order, without loaders.

    Processes that end during the call are omitted.
    """
    workers: dict[int, tuple[int, psutil.Process]] = {}
    for process in process_tree(launcher):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "gigabatch.launcher.worker" in process.cmdline() and "RANK" in process.environ():
                workers[process.pid] = (int(process.environ()["RANK"]), process)
    # A loader is forked from its rank, so it has the same command, and a rank as parent.
    ranks = [(rank, p) for rank, p in workers.values() if _parent_pid(p) not in workers]
    return [process for _, process in sorted(ranks, key=lambda pair: pair[0])]


def _parent_pid(process: psutil.Process) -> int | None:
    with suppress(psutil.NoSuchProcess):
        return process.ppid()
    return None
