"""Time the implementations of a stage.

Their turns alternate, so that other load on the machine affects all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from statistics import median
from typing import Any

from gigabatch.data.bench.stages import BASELINE, GIGABATCH, Variant
from gigabatch.data.errors import GigabatchError

Record = dict[str, Any]
"""JSON values of one stage. `arms` lists the implementations, each with its timed turns in
`each`."""


def time_turn(variant: Variant, seconds: float) -> tuple[float, float]:
    """Time one turn after a warm-up.

    Args:
        variant: Implementation to time.
        seconds: Minimum duration.

    Returns:
        Samples and bytes per second.

    Raises:
        GigabatchError: if the implementation runs out of samples.
    """
    samples = size = 0
    elapsed = 0.0
    with closing(variant.open()) as pieces:  # Closing ends its loader workers.
        for _ in islice(pieces, variant.group):
            start = time.perf_counter()
        for count, (piece_samples, piece_bytes) in enumerate(pieces, 1):
            samples, size = samples + piece_samples, size + piece_bytes
            elapsed = time.perf_counter() - start
            if elapsed >= seconds and count % variant.group == 0:
                break
    if not elapsed:
        raise GigabatchError(
            f"{variant.stage}: {variant.name} ended before it could be timed. Use a larger data "
            "set or a smaller batch.global_size."
        )
    return samples / elapsed, size / elapsed


def compare(variants: Sequence[Variant], seconds: float, repeats: int, record: Record) -> None:
    """Time all implementations of a stage, alternating between them.

    `record` is updated after each round, so Ctrl-C keeps the finished rounds. An exception in an
    implementation other than gigabatch ends only that implementation.

    Args:
        variants: Implementations of one stage.
        seconds: Minimum duration of a turn.
        repeats: Number of turns of each implementation.
        record: Filled with the results.
    """
    record |= {"stage": variants[0].stage, "arms": [{"name": v.name} for v in variants]}
    for _ in range(repeats):
        for variant, result in zip(variants, record["arms"], strict=True):
            if "failed" in result:
                continue
            try:
                rates = time_turn(variant, seconds)
            except Exception as error:
                if variant.name.startswith(GIGABATCH):
                    raise
                result["failed"] = (str(error).splitlines() or [type(error).__name__])[0]
            else:
                result.setdefault("each", []).append(rates)
        add_medians(record)


def add_medians(record: Record) -> None:
    """Add median rates to a record, and the median ratio of gigabatch to webdataset by turn."""
    turns = {result["name"]: result["each"] for result in record["arms"] if "each" in result}
    for result in record["arms"]:
        if "each" in result:
            samples, sizes = zip(*result["each"], strict=True)
            result["samples_per_s"], result["bytes_per_s"] = median(samples), median(sizes)
    if GIGABATCH in turns and BASELINE in turns:
        pairs = zip(turns[GIGABATCH], turns[BASELINE], strict=False)
        record["ratio"] = median(gigabatch[0] / baseline[0] for gigabatch, baseline in pairs)
