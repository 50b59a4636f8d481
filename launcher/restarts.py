"""Restarts of failed workers: repeated while the run makes progress, delayed while it does not.

Ray Train and torchrun restart a failed group a fixed number of times, which a run of weeks can
exhaust. Here each new checkpoint resets the count, and the delay doubles with each attempt without
a new checkpoint.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
LONGEST_WAIT_S = 60.0


def retry_while_progressing(run: RunFolder, limit: int, start: Callable[[], None]) -> None:
    """Call `start` again for as long as each call leaves a new checkpoint.

    Args:
        run: Run folder whose checkpoints show progress.
        limit: Number of restarts that `start` itself makes; 0 means that nothing is retried.
        start: Starts the workers and returns when they have finished, stopped or failed.
    """
    while True:
        before = run.steps_saved()[-1:]
        start()
        after = run.steps_saved()[-1:]
        if limit == 0 or run.is_over() or after <= before:
            return
        log.warning("the workers failed after saving step %d: restarting them", *after)


def wait_for_turn(run: RunFolder, first: int) -> None:
    """Delay rank 0 by 1, 2, 4, ... seconds after attempts that left no new checkpoint.

    A stop request ends the delay.

    Args:
        run: Run folder.
        first: Only attempts with a higher number are counted.
    """
    failed = failed_attempts(run, first)
    if failed == 0 or os.environ.get("RANK", "0") != "0":
        return
    wait = min(2.0 ** (failed - 1), LONGEST_WAIT_S)
    log.warning(
        "%d attempt%s without a new checkpoint; retrying in %.0f s",
        failed, "s" * (failed > 1), wait,
    )  # fmt: skip
    until = time.monotonic() + wait
    while time.monotonic() < until and not run.stop_requested():
        time.sleep(0.1)


def failed_attempts(run: RunFolder, first: int) -> int:
    """Count the last attempts after number `first` that started from the newest checkpoint.

    These attempts ended without a new checkpoint.
    """
    newest = (run.steps_saved() or [0])[-1]
    count = 0
    for number in range(run.attempts(), first, -1):
        # An attempt that was killed early may have no record of its checkpoint; it counts too.
        if run.attempt(number).get("saved", newest) != newest:
            break
        count += 1
    return count
