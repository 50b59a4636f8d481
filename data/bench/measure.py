"""Contenders timed in turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from statistics import median
from typing import Any

from gigabatch.data.bench.arms import OURS, PLAIN, Arm
from gigabatch.data.errors import GigabatchError

Record = dict[str, Any]  # of a stage


def window(arm: Arm, seconds: float) -> tuple[float, float]:
    """Samples and bytes a second, over at least so long, from when the arm runs evenly."""
    samples = size = 0
    took = 0.0
    with closing(arm.open()) as pieces:  # closed: its loader workers end
        for _ in islice(pieces, arm.group):
            began = time.perf_counter()
        for count, (more, bytes_more) in enumerate(pieces, 1):
            samples, size = samples + more, size + bytes_more
            took = time.perf_counter() - began
            if took >= seconds and count % arm.group == 0:
                break
    if not took:
        raise GigabatchError(f"{arm.stage}: {arm.name} came to an end before it could be timed.")
    return samples / took, size / took


def compare(arms: Sequence[Arm], seconds: float, repeats: int, record: Record) -> None:
    """Fill `record` with each contender's rates, a repeat at a time: Ctrl-C leaves those before.
    What another package raises ends that contender alone."""
    record |= {"stage": arms[0].stage, "arms": [{"name": arm.name} for arm in arms]}
    for _ in range(repeats):
        for arm, found in zip(arms, record["arms"], strict=True):
            if "failed" in found:
                continue
            try:
                rates = window(arm, seconds)
            except Exception as error:
                if arm.name.startswith(OURS):
                    raise
                found["failed"] = (str(error).splitlines() or [type(error).__name__])[0]
            else:
                found.setdefault("each", []).append(rates)
        summarise(record)


def summarise(record: Record) -> None:
    """Medians of samples and bytes a second; and of our rate over plain webdataset's, turn by
    turn."""
    each = {found["name"]: found["each"] for found in record["arms"] if "each" in found}
    for found in record["arms"]:
        if "each" in found:
            samples, sizes = zip(*found["each"], strict=True)
            found["samples_per_s"], found["bytes_per_s"] = median(samples), median(sizes)
    if OURS in each and PLAIN in each:
        pairs = zip(each[OURS], each[PLAIN], strict=False)
        record["ratio"] = median(ours[0] / theirs[0] for ours, theirs in pairs)
