"""Counters of a run: steps, skipped steps, rewinds and replaced samples.

They are the same on every rank, and each checkpoint has them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """The counters of a run.

    Attributes:
        done: Steps taken.
        skipped: Steps that were not applied.
        bad_steps: Consecutive steps, up to the last one, that were not applied.
        rewinds: Number of rewinds to a checkpoint.
        bad_samples: Number of replaced samples by number of the source.
    """

    done: int = 0
    skipped: int = 0
    bad_steps: int = 0
    rewinds: int = 0
    bad_samples: Counter[int] = field(default_factory=Counter)

    @classmethod
    def from_checkpoint(cls, step: int, state: Mapping[str, Any]) -> Counts:
        """Return the counters of a checkpoint.

        Args:
            step: Step of the checkpoint.
            state: Its state.json.
        """
        bad = {int(source): count for source, count in state.get("bad_samples", {}).items()}
        rewinds = state.get("rewinds", 0)
        return cls(step, state["skipped"], state["bad_steps"], rewinds, Counter(bad))

    def state(self) -> dict[str, Any]:
        """Return the counters for state.json."""
        return {
            "skipped": self.skipped,
            "bad_steps": self.bad_steps,
            "rewinds": self.rewinds,
            "bad_samples": dict(self.bad_samples),
        }

    def step(self, number: int, applied: bool) -> None:
        """Count step `number`, which was applied or skipped."""
        self.done = number
        self.bad_steps = 0 if applied else self.bad_steps + 1
        self.skipped += not applied
        if not applied:
            log.warning("skipped step %d: a loss or gradient is not finite", number)
