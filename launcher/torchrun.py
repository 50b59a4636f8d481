"""Launcher `torchrun`: workers on this machine, started by PyTorch's own launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from gigabatch.data.processes import exit_with_parent
from gigabatch.launcher.restarts import retry_while_progressing
from gigabatch.trainer.run.folder import RunFolder

EXIT_TIMEOUT_S = 30
"""Seconds that torchrun has to exit after SIGTERM."""
KILL_AFTER_S = "5"
"""Seconds between torchrun's SIGTERM and SIGKILL; only SIGKILL ends a stopped worker."""


def run_torchrun(run: RunFolder) -> None:
    """Train with torchrun on this machine.

    Workers read stop requests from the run folder and record errors there. torchrun ends when this
    process ends, for whatever reason.
    """
    retry_while_progressing(run, run.config().cluster.max_restarts, lambda: _run_worker_group(run))


def _run_worker_group(run: RunFolder) -> None:
    """Start torchrun once and wait for it."""
    cluster = run.config().cluster
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={cluster.max_workers}", f"--max-restarts={cluster.max_restarts}",
        "-m", "gigabatch.launcher.worker", str(run.path), str(run.attempts()),
    ]  # fmt: skip
    environment = {
        **os.environ,
        **cluster.worker_env,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": KILL_AFTER_S,
    }
    with open(run.path / "workers.log", "ab") as output:
        # In a separate session, so that Ctrl-C reaches only this process, which requests a
        # graceful stop.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment,
            start_new_session=True, preexec_fn=_prepare_child,
        )  # fmt: skip
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(EXIT_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def _prepare_child() -> None:
    """Make torchrun ignore preemption notices and end with its parent."""
    for notice in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(notice, signal.SIG_IGN)  # Slurm may send them to all processes of a step
    exit_with_parent(signal.SIGTERM)
