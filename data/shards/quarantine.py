"""Substitute unusable samples: record and count them, up to the limit `data.max_damaged`.

The substitute is a function of (seed, sample, attempt), so it is the same on any rank and loader
worker, and after a resume. Each use of a bad sample is one record in the run's `quarantine.jsonl`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key

ATTEMPTS = 16
"""Maximum number of substitutes to try before the stream stops."""
MIN_SAMPLES = 10_000
"""Minimum denominator of the bad-sample rate, so that one early bad sample does not stop a run."""


@dataclass(frozen=True)
class Substitution:
    """One use of a bad sample.

    Attributes:
        step: The training step.
        micro_batch: Number of the micro-batch in the step.
        source: Number of the source.
        shard: Path or URL of the shard.
        key: The bad sample's key.
        sample: The bad sample's row in the index of the source.
        substitute: The row used instead, in the same index.
        why: What is wrong with the bad sample.
    """

    step: int
    micro_batch: int
    source: int
    shard: str
    key: str
    sample: int
    substitute: int
    why: str

    def record(self) -> dict[str, Any]:
        """Return the record of `quarantine.jsonl`."""
        return asdict(self)


def substitute_row(seed: int, number: int, attempt: int, size: int) -> int:
    """Return the row to read instead of a bad sample.

    Args:
        seed: The run's seed.
        number: The bad sample's number.
        attempt: Number of substitutes tried before.
        size: Number of rows in the index.
    """
    return key(seed, "substitute", number, attempt) % size


def check_damage_rate(
    bad: Mapping[int, int],
    drawn: Mapping[int, int],
    names: Mapping[int, str],
    limit: float,
    example: str = "",
) -> None:
    """Check that no source has too many bad samples.

    Args:
        bad: Source number -> number of bad samples read.
        drawn: Source number -> number of samples read.
        names: Source number -> folder or pattern.
        limit: Largest share of bad samples allowed.
        example: What is wrong with one of them, and what fixes it, for the message.

    Raises:
        GigabatchError: if a source exceeds `limit`.
    """
    for source, count in bad.items():
        if count > limit * max(drawn[source], MIN_SAMPLES):
            raise GigabatchError(
                f"{names[source]}: {count} of {drawn[source]:,} samples read could not be used, "
                f"more than data.max_damaged={limit:g} allows. quarantine.jsonl in the run folder "
                f"lists them. {f'One of them: {example} ' if example else ''}Check the shards with "
                f"`gigabatch data check {names[source]}`."
            )


def count_by_source(substitutions: Iterable[Substitution]) -> Counter[int]:
    """Count bad samples by source number."""
    return Counter(substitution.source for substitution in substitutions)
