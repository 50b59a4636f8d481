"""Which rank is slow: each measures the time that it computes or waits for data, in a step the
part before it waits for the others, and the slowest is set against the median."""

from __future__ import annotations

import logging
import statistics
import time

from gigabatch.trainer.distributed import World
from gigabatch.trainer.monitoring.progress import Progress

log = logging.getLogger(__name__)
RATIO = 1.5
"""Slowest over median (of two: over the other) from which a rank counts as a straggler, ..."""
SHARE = 0.1
"""... where what it takes longer is this much of the whole time, ..."""
REPORTS = 3
"""... and it has been the same rank for so many reports in a row."""


class Stragglers:
    """Asked for metrics on every rank, at the same steps."""

    def __init__(self, world: World, progress: Progress) -> None:
        self.world, self.progress = world, progress
        self.since = time.monotonic()
        self.suspect, self.reports = -1, 0

    def metrics(self, step: int) -> dict[str, float]:
        """perf/slowest_rank and perf/straggler_ratio since the last call: one small collective.
        Nothing where there is one rank. Warns of a straggler."""
        busy = [float(each) for each in self.world.gather(self.progress.take_busy())]
        elapsed, self.since = time.monotonic() - self.since, time.monotonic()
        if len(busy) == 1:
            return {}
        slowest = max(range(len(busy)), key=busy.__getitem__)
        median = statistics.median_low(busy)
        ratio = busy[slowest] / max(median, 1e-9)
        lags = ratio > RATIO and busy[slowest] - median > SHARE * elapsed
        self._suspect(slowest if lags else -1)
        if self.reports == REPORTS:
            log.warning(
                f"rank {slowest} is slow: up to step {step} it was busy {ratio:.1f} times as long "
                f"as the median rank (data, embedding, backward), and all wait for it"
            )
        return {"perf/slowest_rank": float(slowest), "perf/straggler_ratio": ratio}

    def _suspect(self, rank: int) -> None:
        self.reports = 0 if rank < 0 else self.reports + 1 if rank == self.suspect else 1
        self.suspect = rank
