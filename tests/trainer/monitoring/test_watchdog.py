"""Diagnosis of a hang from heartbeats."""

from __future__ import annotations

import time

import pytest

from gigabatch.trainer.monitoring.watchdog import Heartbeat, describe, stopped_ranks


def heartbeats_at(*positions: tuple[int, str], number: int = 7) -> dict[int, Heartbeat]:
    """Return a heartbeat per rank, each without progress for 35 s."""
    progress = time.time() - 35
    return {
        rank: Heartbeat(rank, "node", 100 + rank, "1", number, step, phase, progress)
        for rank, (step, phase) in enumerate(positions)
    }


def test_process_without_a_new_heartbeat_is_stopped() -> None:
    before = heartbeats_at((12, "loss"), (12, "embed"), (12, "loss"))
    after = heartbeats_at((12, "loss"), (12, "embed"), (12, "loss"), number=9)
    assert stopped_ranks(before, after) == set()
    after[1] = before[1]
    assert stopped_ranks(before, after) == {1}


@pytest.mark.parametrize(
    ("positions", "stopped", "message"),
    [
        (
            [(12, "loss"), (12, "embed"), (12, "loss")], {1},
            "rank 1 (process 101 on node) stopped in step 12, phase embed, last progress 35 s ago; "
            "ranks 0, 2 wait for it",
        ),
        (
            [(13, "data"), (12, "step")], set(),
            "rank 1 (process 101 on node) is stuck in step 12, phase step, last progress 35 s ago; "
            "rank 0 waits for it",
        ),
        ([(12, "loss"), (12, "loss")], set(), "all 2 ranks are in step 12, phase loss, for 35 s"),
        (
            [(1, "save")], set(),
            "rank 0 (process 100 on node) is in step 1, phase save, for 35 s",
        ),
    ],
)  # fmt: skip
def test_describe_names_the_rank_that_is_behind(
    positions: list[tuple[int, str]], stopped: set[int], message: str
) -> None:
    assert describe(len(positions), stopped, heartbeats_at(*positions)) == message


def test_describe_names_a_rank_without_a_heartbeat() -> None:
    heartbeats = heartbeats_at((1, "loss"), (1, "loss"), (1, "loss"))
    del heartbeats[1]
    assert describe(3, set(), heartbeats) == "rank 1 wrote no heartbeat; ranks 0, 2 wait for it"
