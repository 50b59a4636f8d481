"""`gigabatch doctor`: checks of this machine before a run; each problem comes with a fix."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.failures import OPEN_FILES
from gigabatch.data.remote.access import check_writable
from gigabatch.data.remote.locations import writable_folder
from gigabatch.data.shards.index import cache_folder
from gigabatch.data.text.captions import ExtraText
from gigabatch.launcher.environment import in_ray_job
from gigabatch.trainer.config import Config

DISK_BYTES = 1 << 30
"""Free disk space below which a run should not start."""
CLOCK_SKEW_S = 2.0
"""Difference in seconds between two clocks above which curves and logs are misleading."""
GATHER_TIMEOUT_S = 180
Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: Subject of the check.
        level: `ok`, `warning`, or `error` if a run cannot start or would fail.
        text: Result.
        fix: Instruction that fixes the problem; empty if there is none.
    """

    subject: str
    level: Level
    text: str
    fix: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok", "warning": "WARNING", "error": "ERROR"}[self.level]
        return f"{self.subject:>14}  {mark:<8}{self.text}{f'. {self.fix}' if self.fix else ''}"


def doctor(
    config: Config | None, check_data: Callable[[Config], str], say: Callable[[str], None]
) -> int:
    """Run all checks and print each finding.

    Args:
        config: Resolved config of a run; None checks only the machine.
        check_data: Opens a run's data and returns a description of it.
        say: Prints a line.

    Returns:
        Exit code: 0 if a run can start, else 2.
    """
    errors = 0
    for finding in _all_checks(config, check_data):
        say(str(finding))
        errors += finding.level == "error"
    say(f"{errors} error{'s' * (errors > 1)}: a run would fail" if errors else "ready for a run")
    return 2 if errors else 0


def check_machine(config: Config, warn: Callable[[str], None]) -> None:
    """Run the quick checks before a run.

    Args:
        config: Resolved config of the run.
        warn: Receives each warning.

    Raises:
        GigabatchError: if a check finds an error.
    """
    for finding in quick_checks(config):
        if finding.level == "error":
            raise GigabatchError(f"{finding.subject}: {finding.text}. {finding.fix}")
        if finding.level == "warning":
            warn(f"{finding.subject}: {finding.text}. {finding.fix}")


def quick_checks(config: Config | None) -> Iterator[Finding]:
    """Yield the findings of checks that take no noticeable time."""
    yield from _packages()
    yield _shared_memory(config)
    yield _open_files()
    yield from _disks(config)
    yield from _copies(config)


def _all_checks(config: Config | None, check_data: Callable[[Config], str]) -> Iterator[Finding]:
    yield Finding("Python", "ok", sys.version.split()[0])
    yield from quick_checks(config)
    yield from _devices()
    yield _clock(config.run.dir if config else Path())
    yield _host()
    if config is not None:
        try:
            yield Finding("data", "ok", check_data(config))
        except GigabatchError as error:
            yield Finding("data", "error", str(error).rstrip("."))
    yield _all_gather(_local_ranks(config) if config else 2)


def _local_ranks(config: Config) -> int:
    """Return the maximum number of a run's ranks on this machine."""
    if config.cluster.launcher == "ray" and in_ray_job():
        return 1  # this process is the driver, and its workers may all be on other nodes
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", config.cluster.max_workers))
    return min(ranks, torch.cuda.device_count() or ranks)


def _packages() -> Iterator[Finding]:
    """Check that the required packages are installed in the required versions."""
    named = []
    for text in requires("gigabatch") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = ""
        if not installed or not requirement.specifier.contains(installed, prereleases=True):
            state = f"{requirement.name} {installed or 'is not installed'}"
            fix = f"pip install '{requirement}'"
            yield Finding("packages", "error", f"{state}; {requirement} is needed", fix)
        elif requirement.name in ("torch", "deepspeed", "ray", "webdataset"):
            named.append(f"{requirement.name} {installed}")
    yield Finding("packages", "ok", ", ".join(named))


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            yield Finding(
                "devices", "warning", f"there is a GPU driver, but torch {torch.__version__} does "
                "not use it", "Install torch for CUDA, in a version that the driver supports",
            )  # fmt: skip
        else:
            yield Finding("devices", "ok", f"no GPU; {len(os.sched_getaffinity(0))} CPU cores")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name, gib = torch.cuda.get_device_name(number), 2**30
        text = f"{name}, {free / gib:.0f} of {total / gib:.0f} GiB free"
        is_busy = free < 0.9 * total
        yield Finding(
            f"GPU {number}", "warning" if is_busy else "ok", text,
            "Another process uses its memory: see nvidia-smi" if is_busy else "",
        )  # fmt: skip
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("CUDA", "ok", f"CUDA {torch.version.cuda}, NCCL {nccl}")
    try:
        yield Finding("Triton", "ok", f"Triton {version('triton')}")
    except PackageNotFoundError:
        yield Finding("Triton", "warning", "not installed", "objective.backend=triton needs it")


def _shared_memory(config: Config | None) -> Finding:
    """Check the free space of /dev/shm, through which loaders pass micro-batches."""
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    need = 64 << 20
    if config is not None:
        data = config.data
        batches = data.workers * (data.prefetch + 2) * _local_ranks(config)
        need = batches * config.batch.micro_size * _sample_bytes(config)
    text = f"{free / 2**20:,.0f} MiB of /dev/shm free; this run needs about {need / 2**20:,.0f} MiB"
    if free < need:  # `need` is an upper bound; with less than half of it, a run would fail
        fix = "Enlarge it (docker: --shm-size), or lower data.workers or data.prefetch"
        return Finding("shared memory", "error" if free < need / 2 else "warning", text, fix)
    return Finding("shared memory", "ok", text)


def _sample_bytes(config: Config) -> int:
    """Return the maximum bytes of one sample's tensors."""
    data, image = config.data, config.data.image
    sizes = {
        "image": image.channels * image.size**2,
        "text": 16 * data.text.length * data.captions.most,
    }
    for name, tower in config.towers.more.items():
        read = tower.decode_settings()
        if isinstance(read, ExtraText):
            sizes[name] = 16 * config.text_length(name)
        elif isinstance(read, VectorSettings):
            sizes[name] = 4 * read.size * getattr(read, "length", 1)
        else:
            sizes[name] = 4 * read.samples
    return sum(sizes[name] for name in config.modalities)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        fix = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
        return Finding("open files", "warning", f"at most {soft:,} per process", fix)
    return Finding("open files", "ok", f"at most {soft:,} per process")


def _disks(config: Config | None) -> Iterator[Finding]:
    folders = {"cache": cache_folder(), "run folder": config.run.dir if config else Path("runs")}
    for subject, folder in folders.items():
        existing = _existing_parent(folder)
        free = shutil.disk_usage(existing).free
        text = f"{folder}: {free / 2**30:,.1f} GiB free"
        key = "GIGABATCH_CACHE" if subject == "cache" else "run.dir"
        if not os.access(existing, os.W_OK):
            text, fix = f"{folder} is not writable", f"Set {key} to a writable folder"
            yield Finding(subject, "error", text, fix)
        elif free < DISK_BYTES:
            yield Finding(subject, "warning", text, f"Free some space, or set {key}")
        else:
            yield Finding(subject, "ok", text)


def _existing_parent(folder: Path) -> Path:
    """Return the folder, or the nearest parent that exists."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def _copies(config: Config | None) -> Iterator[Finding]:
    """Check `checkpoint.copy_to`: write, read and remove a file."""
    if config is None or config.checkpoint.copy_to is None:
        return
    url = writable_folder(config.checkpoint.copy_to)
    try:
        check_writable(url)
    except GigabatchError as error:
        fix = "Set checkpoint.copy_to to a folder where you may write, read and delete"
        yield Finding("checkpoint.copy_to", "error", str(error).rstrip("."), fix)
    else:
        yield Finding("copies", "ok", f"{url} is writable")


def _clock(folder: Path) -> Finding:
    """Compare this machine's clock with the file system's, which a different machine may serve."""
    existing = _existing_parent(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            before = time.time()
            os.utime(file.name)
            skew = os.stat(file.name).st_mtime - before
    except OSError:
        return Finding("clock", "warning", f"{existing} is not writable, so it was not compared")
    text = f"{existing} is {abs(skew):.1f} s {'behind' if skew < 0 else 'ahead of'} this machine"
    if abs(skew) > CLOCK_SKEW_S:
        return Finding("clock", "warning", text, "Synchronize the machines' clocks (NTP)")
    return Finding("clock", "ok", text)


def _host() -> Finding:
    """Check that this host's name has an address, with which ranks on other machines connect."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as server:
            server.bind((address, 0))
    except OSError as error:
        fix = "Add it to /etc/hosts, with the address by which other nodes reach it"
        return Finding("host", "warning", f"{name} has no address here ({error})", fix)
    note = " (which other machines cannot reach)" if address.startswith("127.") else ""
    return Finding("host", "ok", f"{name} is {address}{note}; ports can be opened")


def _all_gather(workers: int) -> Finding:
    """Measure latency and bandwidth of an all-gather between processes on this machine."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={workers}", "-m", "gigabatch.launcher.preflight.all_gather",
    ]  # fmt: skip
    subject = "all-gather"
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=GATHER_TIMEOUT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        result = json.loads(process.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        text = f"{workers} workers did not connect within {GATHER_TIMEOUT_S} s"
        return Finding(subject, "error", text, "Check for a firewall on this machine's own ports")
    except (ValueError, IndexError):
        last = (process.stderr.strip().splitlines() or ["no error message"])[-1]
        return Finding(subject, "error", f"{workers} workers could not communicate: {last}")
    text = (
        f"{workers} workers over {result['backend']}: {result['latency_us']:,.0f} us for 1 KiB, "
        f"{result['bytes_per_s'] / 1e9:.2f} GB/s for 16 MiB"
    )
    return Finding(subject, "ok", text)
