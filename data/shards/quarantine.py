"""Samples that cannot be used: another takes the place of each, is told, counted, and limited.

The substitute is a function of (seed, sample, attempt), so it is the same on any rank and loader
worker, and after a resume. Each use of a bad sample is a record in the run's `quarantine.jsonl`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key

ATTEMPTS = 16
GRACE = 10_000
"""Samples over which the allowed rate is taken at least, so that the first does not stop a run."""


@dataclass(frozen=True)
class Bad:
    """One use of a bad sample. `sample`, `substitute`: row numbers in the source `source`."""

    step: int
    micro_batch: int
    source: int
    shard: str
    key: str
    sample: int
    substitute: int
    why: str

    def record(self) -> dict[str, Any]:
        return asdict(self)


def substitute(seed: int, number: int, attempt: int, size: int) -> int:
    """The row, of `size`, to be read in place of sample `number`; `attempt` counts from 0."""
    return key(seed, "substitute", number, attempt) % size


def refuse_above_rate(
    bad: Mapping[int, int], drawn: Mapping[int, int], names: Mapping[int, str], limit: float
) -> None:
    """Raise GigabatchError where more than the share `limit` of a source's samples was bad."""
    for source, count in bad.items():
        if count > limit * max(drawn[source], GRACE):
            raise GigabatchError(
                f"{names[source]}: {count} of {drawn[source]:,} samples read could not be used, "
                f"more than data.max_damaged={limit:g} allows; quarantine.jsonl in the run folder "
                f"names each. Check the shards with `gigabatch data check {names[source]}`."
            )


def by_source(found: Iterable[Bad]) -> Counter[int]:
    return Counter(bad.source for bad in found)
