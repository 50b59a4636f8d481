"""How far a run has come, and what went wrong on the way. The same on every rank, and saved in each
checkpoint."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """`done`: steps taken; `skipped`: of these, not applied; `bad_steps`: of these, since the last
    that was; `rewinds`: to a checkpoint; `bad_samples`: of each source, by its number."""

    done: int = 0
    skipped: int = 0
    bad_steps: int = 0
    rewinds: int = 0
    bad_samples: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, step: int, state: Mapping[str, Any]) -> Counts:
        """As they stood in the checkpoint of a step."""
        bad = {int(source): count for source, count in state.get("bad_samples", {}).items()}
        rewinds = state.get("rewinds", 0)
        return cls(step, state["skipped"], state["bad_steps"], rewinds, Counter(bad))

    def state(self) -> dict[str, Any]:
        """What `of` reads, for a checkpoint."""
        return {
            "skipped": self.skipped,
            "bad_steps": self.bad_steps,
            "rewinds": self.rewinds,
            "bad_samples": dict(self.bad_samples),
        }

    def step(self, number: int, applied: bool) -> None:
        """Step `number` was taken, and its result applied or not."""
        self.done = number
        self.bad_steps = 0 if applied else self.bad_steps + 1
        self.skipped += not applied
        if not applied:
            log.warning("step %d skipped: a loss or gradient is not finite", number)
