"""Workers on this machine under torch's own launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from gigabatch.data.processes import exit_with_parent
from gigabatch.launcher.restarts import while_it_gets_on
from gigabatch.trainer.run.folder import RunFolder

GRACE = 30  # seconds for torchrun to end
KILL_AFTER = "5"  # seconds from torchrun's SIGTERM to SIGKILL: a stopped worker hears only that


def run_torchrun(run: RunFolder) -> None:
    """Train with torch's own launcher on this machine. Workers hear of a stop through the run
    folder, and leave there what went wrong. It ends with this process, however that ends."""
    while_it_gets_on(run, run.config().cluster.max_restarts, lambda: _once(run))


def _once(run: RunFolder) -> None:
    cluster = run.config().cluster
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={cluster.most}", f"--max-restarts={cluster.max_restarts}",
        "-m", "gigabatch.launcher.worker", str(run.path), str(run.attempts()),
    ]  # fmt: skip
    environment = {
        **os.environ,
        **cluster.worker_env,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": KILL_AFTER,
    }
    with open(run.path / "workers.log", "ab") as output:
        # Its own session: Ctrl-C reaches this process alone, which then asks for a clean stop.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment,
            start_new_session=True, preexec_fn=_as_a_child,
        )  # fmt: skip
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def _as_a_child() -> None:
    for notice in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(notice, signal.SIG_IGN)  # Slurm may send them to all processes of a step
    exit_with_parent(signal.SIGTERM)
