"""One rank: what a Ray worker calls, and `python -m gigabatch.launcher.worker RUN` in torchrun."""

from __future__ import annotations

import os
import platform
import sys
import traceback
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.distributed import leave
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.runfolder import RunFolder


def work(run: RunFolder) -> None:
    """Train as one rank. What goes wrong is left in the run folder for whoever started the
    workers: a fault that the user must put right, after which nobody starts them again, or the
    traceback of a crash. A stop comes through the run folder too."""
    if run.failure() is not None:
        return
    try:
        run_training(run)
    except GigabatchError as error:
        run.record_failure(str(error))
        raise
    except Exception:
        rank, host = os.environ.get("RANK", "0"), platform.node()
        run.record_crash(f"rank {rank} on {host} was the first:\n{traceback.format_exc()}")
        raise


if __name__ == "__main__":
    work(RunFolder(Path(sys.argv[1])))
    leave(0)
