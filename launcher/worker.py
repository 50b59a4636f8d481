"""Training as one rank: called by a Ray worker, or run by torchrun as
`python -m gigabatch.launcher.worker RUN FIRST`."""

from __future__ import annotations

import os
import platform
import signal
import sys
import traceback
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.data.failures import LostProcess, as_failure, raise_open_file_limit
from gigabatch.data.processes import exit_with_parent
from gigabatch.launcher.restarts import wait_for_turn
from gigabatch.trainer.distributed import exit_now
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.folder import RunFolder, Superseded


def work(run: RunFolder, first: int) -> None:
    """Train as one rank; record errors in the run folder for the starting process.

    A user error is recorded as a failure, after which workers are not restarted; any other
    exception is recorded with its traceback, and raised as one that torchrun and Ray take for a
    failure. Stop requests are read from the folder too.

    Args:
        run: Run folder.
        first: Number of the last attempt before this start of the workers.
    """
    if run.failure() is not None:
        return
    raise_open_file_limit()
    wait_for_turn(run, first)
    try:
        run_training(run)
    except Superseded:
        raise
    except BaseException as error:
        failure = as_failure(error)
        if isinstance(failure, GigabatchError) and not isinstance(failure, LostProcess):
            run.record_failure(str(failure))
        else:
            record_crash(run, error, failure)
        if failure is error:
            raise
        raise failure from error


def record_crash(run: RunFolder, error: BaseException, failure: Exception) -> None:
    """Record an error in the run folder: its message if that explains it, else its traceback.

    Args:
        run: Run folder.
        error: The error.
        failure: `as_failure(error)`.
    """
    rank, host = os.environ.get("RANK", "0"), platform.node()
    text = str(failure)
    if not isinstance(failure, GigabatchError):
        text = "".join(traceback.format_exception(error)).rstrip()
        text += f"\n{failure}" if failure is not error else ""
    run.record_crash(f"rank {rank} on {host} failed first:\n{text}\n")


if __name__ == "__main__":
    # torchrun starts each rank in a new session, so ranks would outlive torchrun.
    exit_with_parent(signal.SIGKILL)
    work(RunFolder(Path(sys.argv[1])), int(sys.argv[2]))
    exit_now(0)
