"""One rank: what a Ray worker calls, and `python -m gigabatch.launcher.worker RUN FIRST` in
torchrun."""

from __future__ import annotations

import os
import platform
import signal
import sys
import traceback
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.data.processes import exit_with_parent
from gigabatch.launcher.restarts import wait_for_turn
from gigabatch.trainer.distributed import leave
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.folder import RunFolder, Superseded


def work(run: RunFolder, first: int) -> None:
    """Train as one rank, in a start of the workers after attempt number `first`. What goes wrong
    is left in the run folder for whoever started them: a fault that the user must put right, after
    which nobody starts them again, or the traceback of a crash. A stop comes through the run
    folder too."""
    if run.failure() is not None:
        return
    wait_for_turn(run, first)
    try:
        run_training(run)
    except Superseded:
        raise
    except GigabatchError as error:
        run.record_failure(str(error))
        raise
    except Exception:
        rank, host = os.environ.get("RANK", "0"), platform.node()
        run.record_crash(f"rank {rank} on {host} was the first:\n{traceback.format_exc()}")
        raise


if __name__ == "__main__":
    exit_with_parent(signal.SIGKILL)  # torchrun's ranks are sessions of their own, and outlive it
    work(RunFolder(Path(sys.argv[1])), int(sys.argv[2]))
    leave(0)
