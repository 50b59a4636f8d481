"""Benchmark data loading: measure the speed of each stage, and find the bottleneck."""

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

from gigabatch.data.bench import baseline
from gigabatch.data.bench.measure import Record, compare
from gigabatch.data.bench.report import bottleneck, line, stage_rates, tables, write
from gigabatch.data.bench.setup import Setup
from gigabatch.data.bench.stages import BASELINE, GIGABATCH, IN_LOADER, variants_by_stage
from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.locations import is_remote

REPEATS = 5
MAX_TURN_S = 2.0
OVERHEAD = 1.5
"""Estimated duration of a turn with start-up and shutdown, relative to its timed part."""
CACHED_BYTES = 4 << 30
"""Shards up to this total size are read once before the benchmark."""
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
    max_turn_s: float = MAX_TURN_S,
) -> int:
    """Measure all stages and report; Ctrl-C stops early and reports the results so far.

    Args:
        setup: Data to read.
        minutes: Approximate duration in minutes; no stage starts later.
        out: Folder for `data.json` and `data.md`; None writes no files.
        say: Function that prints a line.
        machine: Facts to report in addition to versions and cores.
        command: Command line to report.
        repeats: Number of turns of each implementation.
        max_turn_s: Maximum duration of a turn in seconds.

    Returns:
        Exit code.

    Raises:
        GigabatchError: if the data cannot be read, or `out` cannot be written.
    """
    if not minutes > 0:
        raise GigabatchError(f"--minutes is {minutes:g}; specify a number above 0.")
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "data.json").open("a").close()
        except OSError as error:
            raise GigabatchError(
                f"--out {out} cannot be written: {error.strerror}. Choose another folder."
            ) from None
    # A background process of a shell script ignores Ctrl-C by default.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results = bench(setup, minutes, say, repeats, max_turn_s) | {"command": command}
    results["machine"] = {**(machine or {}), **results["machine"]}
    if out is not None:
        write(results, out)
    say("\n" + tables(results).rstrip())
    if out is not None:
        say(f"results: {out}/data.json, {out}/data.md")
    if results["stopped"]:
        print(f"stopped early: {results['stopped']}", file=sys.stderr)
    return INTERRUPTED if results["stopped"] else 0


def bench(
    setup: Setup,
    minutes: float,
    say: Say,
    repeats: int = REPEATS,
    max_turn_s: float = MAX_TURN_S,
) -> dict[str, Any]:
    """Measure all stages.

    Args:
        setup: Data to read.
        minutes: Approximate duration in minutes; no stage starts later.
        say: Called with a line of results after each stage.
        repeats: Number of turns of each implementation.
        max_turn_s: Maximum duration of a turn in seconds.

    Returns:
        Results as JSON values.
    """
    deadline = time.monotonic() + 60 * minutes
    cores = len(os.sched_getaffinity(0))
    results: dict[str, Any] = {
        "machine": _machine(cores),
        "config": setup.describe(),
        "contenders": _implementations(setup),
        "stages": [],
        "left_out": [],
        "stopped": None,
        "bottleneck": "",
    }
    try:
        with _single_threaded_tokenizers():
            results["config"]["cached"] = _warm_page_cache(setup)
            stages = list(variants_by_stage(setup))
            turns = repeats * sum(map(len, stages))
            seconds = min(max_turn_s, 60 * minutes / turns / OVERHEAD)
            for variants in stages:
                stage = variants[0].stage
                if time.monotonic() > deadline:
                    results["left_out"].append(stage)
                    continue
                record: Record = {}
                results["stages"].append(record)
                with _torch_threads(1 if stage in IN_LOADER else None):
                    compare(variants, seconds, repeats, record)
                say(line(record))
    except KeyboardInterrupt:
        results["stopped"] = "interrupted"
    rates = stage_rates(results["stages"])
    if rates:
        results["bottleneck"] = bottleneck(rates, setup.workers[-1], cores)
    return results


def _machine(cores: int) -> dict[str, Any]:
    return {
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.2f}",
        **{name: version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }


def _implementations(setup: Setup) -> dict[str, str]:
    """Describe the implementations that are compared."""
    return {
        GIGABATCH: "open_stream over the index, in the order of the run; verifies every member's "
        "checksum if the index has checksums; decodes large JPEGs at a reduced scale",
        BASELINE: baseline.unsupported(setup) or baseline.describe(setup),
    }


def _warm_page_cache(setup: Setup) -> bool:
    """Read local shards once if they fit the system's page cache; return whether they do."""
    local = [name for name in setup.shards if not is_remote(name)]
    if sum(map(os.path.getsize, local)) > CACHED_BYTES:
        return False
    for name in local:
        with open(name, "rb") as file:
            while file.read(16 << 20):
                pass
    return True


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Set the number of torch threads inside the block; None leaves it unchanged.

    Loader workers use one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Limit `tokenizers` to one thread; it would use all cores, or print a warning in workers."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
