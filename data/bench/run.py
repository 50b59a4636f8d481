"""`gigabatch bench data`: how fast a run's samples can be read here, and what holds them up."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gigabatch.data.bench import plain
from gigabatch.data.bench.arms import IN_LOADER, OURS, PLAIN, arms
from gigabatch.data.bench.measure import compare
from gigabatch.data.bench.report import alone, bottleneck, line, tables, write
from gigabatch.data.bench.setup import Setup
from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.locations import is_remote

REPEATS = 5
LONGEST_S = 2.0  # of a turn
OVERHEAD = 1.5  # what turns take, beginning and end included, over what is timed of them
CACHED_BYTES = 4 << 30
PACKAGES = ("webdataset", "pillow", "tokenizers", "torch", "numpy", "google-crc32c")
INTERRUPTED = 130
Say = Callable[[str], None]


def run(
    setup: Setup,
    *,
    minutes: float,
    out: Path | None,
    say: Say,
    machine: Mapping[str, Any] | None = None,
    command: str = "",
    repeats: int = REPEATS,
    longest_s: float = LONGEST_S,
) -> int:
    """Measure, say the tables, write `data.json` and `data.md` into `out`; returns the exit code.

    `minutes`: about how long everything takes; no stage is begun after them. `machine`: what
    the report says of it, besides versions and cores. Ctrl-C ends it with what there is. Raises
    GigabatchError for what cannot be read, and where `out` cannot be written.
    """
    if not minutes > 0:
        raise GigabatchError(f"--minutes is {minutes:g}; give a number above 0.")
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "data.json").open("a").close()
        except OSError as error:
            raise GigabatchError(f"--out {out} cannot be written: {error.strerror}.") from None
    # A process that a script started in the background has Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found = bench(setup, minutes, say, repeats, longest_s) | {"command": command}
    found["machine"] = {**(machine or {}), **found["machine"]}
    if out is not None:
        write(found, out)
    say("\n" + tables(found).rstrip())
    if out is not None:
        say(f"written: {out}/data.json, data.md")
    if found["stopped"]:
        print(f"stopped early: {found['stopped']}", file=sys.stderr)
    return INTERRUPTED if found["stopped"] else 0


def bench(
    setup: Setup,
    minutes: float,
    say: Say,
    repeats: int = REPEATS,
    longest_s: float = LONGEST_S,
) -> dict[str, Any]:
    """All figures; `say` gets a line as each stage is found.

    Each contender has `repeats` turns, of at most about `longest_s` seconds.
    """
    deadline = time.monotonic() + 60 * minutes
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {
        "machine": _machine(cores),
        "config": setup.describe(),
        "contenders": _contenders(setup),
        "stages": [],
        "left_out": [],
        "stopped": None,
        "bottleneck": "",
    }
    try:
        with _one_thread_of_tokenisers():
            found["config"]["cached"] = _read_once(setup)
            listed = list(arms(setup))
            turns = repeats * sum(map(len, listed))
            seconds = min(longest_s, 60 * minutes / turns / OVERHEAD)
            for stage in listed:
                if time.monotonic() > deadline:
                    found["left_out"].append(stage[0].stage)
                    continue
                found["stages"].append({})
                with _one_thread(stage[0].stage in IN_LOADER):
                    compare(stage, seconds, repeats, found["stages"][-1])
                say(line(found["stages"][-1]))
    except KeyboardInterrupt:
        found["stopped"] = "interrupted"
    rates = alone(found["stages"])
    if rates:
        found["bottleneck"] = bottleneck(rates, setup.workers[-1], cores)
    return found


def _machine(cores: int) -> dict[str, Any]:
    return {
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.2f}",
        **{name: version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }


def _contenders(setup: Setup) -> dict[str, str]:
    """How each is put together."""
    return {
        OURS: "open_stream over the index, in the order of the run; every member's checksum "
        "verified, if the index has them; large JPEGs decoded at a reduced scale",
        PLAIN: plain.unable(setup) or plain.describe(setup),
    }


def _read_once(setup: Setup) -> bool:
    """Bring the local shards into the system's cache, if they are not too large for it."""
    local = [name for name in setup.shards if not is_remote(name)]
    if sum(map(os.path.getsize, local)) > CACHED_BYTES:
        return False
    for name in local:
        with open(name, "rb") as file:
            while file.read(16 << 20):
                pass
    return True


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """As loader workers have; the training process has more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _one_thread_of_tokenisers() -> Iterator[None]:
    """`tokenizers` would take every core for itself, or, in loader workers, warn and take one."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
