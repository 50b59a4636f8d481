"""One rank under torchrun: `python -m gigabatch.launcher.worker RUN`. Used by the launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.runfolder import RunFolder


def work(run: RunFolder) -> None:
    """Train as one rank. A fault that the user must put right is recorded first, so that whoever
    started the workers shows it instead of a traceback, and does not start them again. A stop
    comes through the run folder; SIGTERM is torchrun's way to end a rank at once."""
    if run.failure() is not None:
        return
    try:
        run_training(run)
    except GigabatchError as error:
        run.record_failure(str(error))
        raise


if __name__ == "__main__":
    work(RunFolder(Path(sys.argv[1])))
