"""One rank under torchrun: `python -m gigabatch.launcher.worker RUN`. Used by the launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.signals import stop_on_signals
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.runfolder import RunFolder


def work(run: RunFolder) -> None:
    """Train as one rank. A fault that the user must put right is recorded first, so that whoever
    started the workers shows it instead of a traceback, and does not start them again."""
    if run.failure() is not None:
        return
    try:
        with stop_on_signals() as stop:
            run_training(run, stop)
    except GigabatchError as error:
        run.record_failure(str(error))
        raise


if __name__ == "__main__":
    work(RunFolder(Path(sys.argv[1])))
