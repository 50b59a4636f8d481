"""Starting failed workers again: patiently, and for as long as the run gets on.

The launcher below (Ray Train, torchrun) starts a failed group again a fixed number of times. A run
of weeks meets more faults than that; one that cannot work should not be tried for ever. So the
count begins anew with each new checkpoint, and without one each start waits longer.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
LONGEST_WAIT_S = 60.0


def while_it_gets_on(run: RunFolder, limit: int, start: Callable[[], None]) -> None:
    """Call `start`, which starts the workers and restarts them `limit` times, and call it again
    where they failed in the end, but with a newer checkpoint than before."""
    while True:
        before = run.steps_saved()[-1:]
        start()
        after = run.steps_saved()[-1:]
        if limit == 0 or run.is_over() or after <= before:
            return
        log.warning("the workers failed, after a new checkpoint (step %d): starting again", *after)


def wait_for_turn(run: RunFolder, first: int) -> None:
    """Before a rank 0 trains: 1, 2, 4, ... seconds after each attempt that failed without a new
    checkpoint, of those after attempt `first`. A stop that is asked for ends the wait."""
    in_vain = attempts_in_vain(run, first)
    if in_vain == 0 or os.environ.get("RANK", "0") != "0":
        return
    wait = min(2.0 ** (in_vain - 1), LONGEST_WAIT_S)
    log.warning("the last %d starts left no new checkpoint: waiting %.0f s", in_vain, wait)
    until = time.monotonic() + wait
    while time.monotonic() < until and not run.stop_requested():
        time.sleep(0.1)


def attempts_in_vain(run: RunFolder, first: int) -> int:
    """How many of the last attempts, after number `first`, began at the newest checkpoint: they
    ended without another."""
    newest = (run.steps_saved() or [0])[-1]
    count = 0
    for number in range(run.attempts(), first, -1):
        # Killed, or out of room, as it began: in vain too.
        if run.attempt(number).get("saved", newest) != newest:
            break
        count += 1
    return count
