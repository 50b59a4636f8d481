"""Workers without Ray: in this process, or under torch's own launcher, started from here."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from gigabatch.launcher.signals import StopRequest
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.runfolder import RunFolder

GRACE = 30  # seconds that torchrun gives its workers to end


def run_inline(run: RunFolder, stop: StopRequest) -> None:
    run_training(run, stop)


def run_torchrun(run: RunFolder) -> str | None:
    """Start torch's own launcher on this machine and wait; what failed, or None. Workers hear of
    a stop through the run folder. It ends with this process, however that ends."""
    cluster = run.config().cluster
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={cluster.workers}", f"--max-restarts={cluster.max_restarts}",
        "-m", "gigabatch.launcher.worker", str(run.path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(cluster.threads)}
    printed = run.path / "workers.log"
    with open(printed, "ab") as output:
        before = output.tell()
        # Its own session: Ctrl-C reaches this process alone, which then asks for a clean stop.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        try:
            return _first_fault(printed, before) if process.wait() else None
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def _first_fault(printed: Path, start: int) -> str:
    """The first traceback among what the workers printed, all of which stays in `printed`."""
    with open(printed, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = iter(file.read().splitlines())
    kept: list[str] = []
    for line in lines:
        begun = bool(kept)
        text = re.sub(r"^\[rank\d+\]:\s?", "", line)
        if begun or text.startswith("Traceback (most recent call last)"):
            kept.append(text)
        if begun and re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", text):
            return "\n".join([*kept, f"(all that the workers printed: {printed})"])
    return f"a worker was killed; see {printed}"


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
