"""`gigabatch doctor`: what this machine lacks for a run, and how to mend it."""

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
from gigabatch.data.remote.places import writable_folder
from gigabatch.data.remote.writes import check_writable
from gigabatch.data.shards.index import cache_folder
from gigabatch.data.text.captions import ExtraText
from gigabatch.launcher.environment import in_ray_job
from gigabatch.trainer.config import Config

FILES = 4096
"""Open files that a rank may come to: its shards, and its loaders' pipes and shared memory."""
ROOM = 1 << 30
"""Bytes of disk without which no run should begin."""
SKEW_S = 2.0
"""Seconds by which two clocks may differ before curves and logs confuse."""
GATHER_TIMEOUT_S = 180
Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what to do about it. A fault: no run could start, or end well."""

    about: str
    level: Level
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok", "warning": "WARNING", "fault": "FAULT"}[self.level]
        return f"{self.about:>14}  {mark:<8}{self.what}{f'. {self.remedy}' if self.remedy else ''}"


def doctor(
    config: Config | None, check_data: Callable[[Config], str], say: Callable[[str], None]
) -> int:
    """Look at everything, say each finding; 0 where a run could start, else 2.

    `check_data`: opens a run's data, and says what there is.
    """
    faults = 0
    for finding in _all(config, check_data):
        say(str(finding))
        faults += finding.level == "fault"
    said = (
        f"{faults} fault{'s' * (faults > 1)}: a run could not start" if faults else "fit for a run"
    )
    say(said)
    return 2 if faults else 0


def refuse_unfit(config: Config, warn: Callable[[str], None]) -> None:
    """What takes no time, before a run begins. Raises GigabatchError for a fault."""
    for finding in quick(config):
        if finding.level == "fault":
            raise GigabatchError(f"{finding.about}: {finding.what}. {finding.remedy}")
        if finding.level == "warning":
            warn(f"{finding.about}: {finding.what}. {finding.remedy}")


def quick(config: Config | None) -> Iterator[Finding]:
    """What takes no time."""
    yield from _packages()
    yield _shared_memory(config)
    yield _open_files()
    yield from _disks(config)
    yield from _copies(config)


def _all(config: Config | None, check_data: Callable[[Config], str]) -> Iterator[Finding]:
    yield Finding("Python", "ok", sys.version.split()[0])
    yield from quick(config)
    yield from _devices()
    yield _clock(config.run.dir if config else Path())
    yield _host()
    if config is not None:
        try:
            yield Finding("data", "ok", check_data(config))
        except GigabatchError as error:
            yield Finding("data", "fault", str(error).rstrip("."))
    yield _gather(_ranks_here(config) if config else 2)


def _ranks_here(config: Config) -> int:
    """How many of a run's ranks may share this machine; of a Ray job's driver, none need do."""
    if config.cluster.launcher == "ray" and in_ray_job():
        return 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", config.cluster.most))
    return min(ranks, torch.cuda.device_count() or ranks)


def _packages() -> Iterator[Finding]:
    """Whether what the package asks for is installed, in the versions that it asks for."""
    found = []
    for text in requires("gigabatch") or []:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(wanted.name)
        except PackageNotFoundError:
            have = ""
        if not have or not wanted.specifier.contains(have, prereleases=True):
            what = f"{wanted.name} {have or 'is not installed'}; {wanted} is needed"
            yield Finding("packages", "fault", what, f"pip install '{wanted}'")
        elif wanted.name in ("torch", "deepspeed", "ray", "webdataset"):
            found.append(f"{wanted.name} {have}")
    yield Finding("packages", "ok", ", ".join(found))


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            yield Finding(
                "devices", "warning", f"a GPU's driver is here, but torch {torch.__version__} "
                "does not use it", "Install torch for CUDA, in a version that the driver knows",
            )  # fmt: skip
        else:
            yield Finding("devices", "ok", f"no GPU; {len(os.sched_getaffinity(0))} CPU cores")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name, gib = torch.cuda.get_device_name(number), 2**30
        what = f"{name}, {free / gib:.0f} of {total / gib:.0f} GiB free"
        busy = free < 0.9 * total
        yield Finding(
            f"GPU {number}", "warning" if busy else "ok", what,
            "Another process holds memory there: see nvidia-smi" if busy else "",
        )  # fmt: skip
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("CUDA", "ok", f"CUDA {torch.version.cuda}, NCCL {nccl}")
    try:
        yield Finding("Triton", "ok", f"Triton {version('triton')}")
    except PackageNotFoundError:
        yield Finding("Triton", "warning", "not installed", "objective.backend=triton needs it")


def _shared_memory(config: Config | None) -> Finding:
    """Loaders hand over micro-batches through it."""
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    need = 64 << 20
    if config is not None:
        data = config.data
        held = data.workers * (data.prefetch + 2) * _ranks_here(config)
        need = held * config.batch.micro_size * _sample_bytes(config)
    what = f"{free / 2**20:,.0f} MiB of /dev/shm free, a run here takes about {need / 2**20:,.0f}"
    if free < need:  # the rest is for what is asked for and never filled
        remedy = "Enlarge it (docker: --shm-size), or lower data.workers or data.prefetch"
        return Finding("shared memory", "fault" if free < need / 2 else "warning", what, remedy)
    return Finding("shared memory", "ok", what)


def _sample_bytes(config: Config) -> int:
    """Of the tensors of one sample, at most."""
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
    if soft < FILES:
        remedy = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
        return Finding("open files", "warning", f"at most {soft:,} a process", remedy)
    return Finding("open files", "ok", f"at most {soft:,} a process")


def _disks(config: Config | None) -> Iterator[Finding]:
    places = {"cache": cache_folder(), "run folder": config.run.dir if config else Path("runs")}
    for about, folder in places.items():
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        free = shutil.disk_usage(there).free
        what = f"{folder}: {free / 2**30:,.1f} GiB free"
        key = "GIGABATCH_CACHE" if about == "cache" else "run.dir"
        if not os.access(there, os.W_OK):
            what = f"{folder} cannot be written"
            yield Finding(about, "fault", what, f"Set {key} to a folder that you may write")
        elif free < ROOM:
            yield Finding(about, "warning", what, f"Make room, or set {key} elsewhere")
        else:
            yield Finding(about, "ok", what)


def _copies(config: Config | None) -> Iterator[Finding]:
    """Whether checkpoints can be copied: a file is written there, read and removed."""
    if config is None or config.checkpoint.copy_to is None:
        return
    url = writable_folder(config.checkpoint.copy_to)
    try:
        check_writable(url)
    except GigabatchError as error:
        remedy = "Set checkpoint.copy_to to a folder that you may write, read and empty"
        yield Finding("checkpoint.copy_to", "fault", str(error).rstrip("."), remedy)
    else:
        yield Finding("copies", "ok", f"{url} can be written")


def _clock(folder: Path) -> Finding:
    """Against the clock of the file system, which on a network is another machine's."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            before = time.time()
            os.utime(file.name)
            skew = os.stat(file.name).st_mtime - before
    except OSError:
        return Finding("clock", "warning", f"{there} cannot be written, so it was not compared")
    what = f"{abs(skew):.1f} s {'before' if skew < 0 else 'after'} this machine's on {there}"
    if abs(skew) > SKEW_S:
        return Finding("clock", "warning", what, "Set the machines' clocks alike (NTP)")
    return Finding("clock", "ok", what)


def _host() -> Finding:
    """Ranks on other machines reach this one by the address of its name."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as one:
            one.bind((address, 0))
    except OSError as error:
        remedy = "Name it in /etc/hosts, with the address by which other nodes reach it"
        return Finding("host", "warning", f"{name} has no address here ({error})", remedy)
    here = " (by which other machines do not reach it)" if address.startswith("127.") else ""
    return Finding("host", "ok", f"{name} is {address}{here}, and ports can be opened there")


def _gather(workers: int) -> Finding:
    """Between as many processes on this machine: latency of a small all-gather, rate of a large."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={workers}", "-m", "gigabatch.launcher.preflight.all_gather",
    ]  # fmt: skip
    about = "all-gather"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=GATHER_TIMEOUT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        what = f"{workers} workers did not meet within {GATHER_TIMEOUT_S} s"
        return Finding(about, "fault", what, "Is a firewall on this machine's own ports?")
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return Finding(about, "fault", f"{workers} workers could not talk: {last}")
    what = (
        f"{workers} workers over {found['backend']}: {found['latency_us']:,.0f} us for 1 KiB, "
        f"{found['bytes_per_s'] / 1e9:.2f} GB/s for 16 MiB"
    )
    return Finding(about, "ok", what)
