"""The processes of a run that torchrun trains on this machine, found from its launcher's."""

from __future__ import annotations

from contextlib import suppress

import psutil


def everything_below(launcher: int) -> list[psutil.Process]:
    """A process by its id, and all below it; none where it has ended."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(launcher)
        return [top, *top.children(recursive=True)]
    return []


def ranks_below(launcher: int) -> list[psutil.Process]:
    """The training processes below a `gigabatch` process, in rank order, without their loaders.
    Those that end while they are looked at are left out."""
    found: dict[int, tuple[int, psutil.Process]] = {}
    for each in everything_below(launcher):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "gigabatch.launcher.worker" in each.cmdline() and "RANK" in each.environ():
                found[each.pid] = (int(each.environ()["RANK"]), each)
    # A loader is a fork of its rank: the same command, below it.
    ranks = [(rank, each) for rank, each in found.values() if _parent(each) not in found]
    return [each for _, each in sorted(ranks, key=lambda pair: pair[0])]


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.NoSuchProcess):
        return process.ppid()
    return None
