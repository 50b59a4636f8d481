"""Detection of slow ranks.

Each rank measures how long it computes or waits for data, which is the part of a step without waits
for other ranks. The slowest rank is compared with the median.
"""

from __future__ import annotations

import logging
import statistics
import time

from gigabatch.trainer.distributed import World
from gigabatch.trainer.monitoring.progress import Progress

log = logging.getLogger(__name__)
RATIO = 1.5
"""A straggler takes more than this multiple of the median; with two ranks, of the faster one."""
SHARE = 0.1
"""Its time above the median is more than this share of the elapsed time."""
REPORTS = 3
"""Number of consecutive reports with the same straggler after which a warning is logged."""


class Stragglers:
    """Compares the ranks' computing times at each report."""

    def __init__(self, world: World, progress: Progress) -> None:
        self.world, self.progress = world, progress
        self.since = time.monotonic()
        self.suspect, self.reports = -1, 0

    def metrics(self, step: int) -> dict[str, float]:
        """Return perf/slowest_rank and perf/straggler_ratio since the last call.

        Collective: every rank must call it. Returns {} for a single rank. Logs a warning if a rank
        is a straggler.
        """
        busy = [float(seconds) for seconds in self.world.gather(self.progress.take_busy())]
        elapsed, self.since = time.monotonic() - self.since, time.monotonic()
        if len(busy) == 1:
            return {}
        slowest = max(range(len(busy)), key=busy.__getitem__)
        median = statistics.median_low(busy)
        ratio = busy[slowest] / max(median, 1e-9)
        is_slow = ratio > RATIO and busy[slowest] - median > SHARE * elapsed
        self._count_reports(slowest if is_slow else -1)
        if self.reports == REPORTS:
            log.warning(
                f"rank {slowest} is slow: up to step {step} it was busy {ratio:.1f} times as long "
                f"as the median rank (data, embedding, backward), and all ranks wait for it"
            )
        return {"perf/slowest_rank": float(slowest), "perf/straggler_ratio": ratio}

    def _count_reports(self, rank: int) -> None:
        """Count consecutive reports of the same slow rank; -1 is none."""
        self.reports = 0 if rank < 0 else self.reports + 1 if rank == self.suspect else 1
        self.suspect = rank
