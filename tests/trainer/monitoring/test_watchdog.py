from __future__ import annotations

import time

import pytest

from gigabatch.trainer.monitoring.watchdog import Heartbeat, describe, stopped_ranks


def beats(*places: tuple[int, str], number: int = 7) -> dict[int, Heartbeat]:
    at = time.time() - 35
    return {
        rank: Heartbeat(rank, "node", 100 + rank, "1", number, step, phase, at)
        for rank, (step, phase) in enumerate(places)
    }


def test_a_process_without_a_beat_is_stopped() -> None:
    before = beats((12, "loss"), (12, "embed"), (12, "loss"))
    after = beats((12, "loss"), (12, "embed"), (12, "loss"), number=9)
    assert stopped_ranks(before, after) == set()
    after[1] = before[1]
    assert stopped_ranks(before, after) == {1}


@pytest.mark.parametrize(
    ("places", "stopped", "words"),
    [
        (
            [(12, "loss"), (12, "embed"), (12, "loss")], {1},
            "rank 1 (process 101 on node) stopped in step 12, phase embed, 35 s ago; "
            "ranks 0, 2 wait for it",
        ),
        (
            [(13, "data"), (12, "step")], set(),
            "rank 1 (process 101 on node) is stuck in step 12, phase step, 35 s ago; "
            "rank 0 waits for it",
        ),
        ([(12, "loss"), (12, "loss")], set(), "all 2 ranks are in step 12, phase loss, since 35 s"),
        (
            [(1, "save")], set(),
            "rank 0 (process 100 on node) is in step 1, phase save, since 35 s",
        ),
    ],
)  # fmt: skip
def test_the_rank_that_is_behind_is_named(
    places: list[tuple[int, str]], stopped: set[int], words: str
) -> None:
    assert describe(len(places), stopped, beats(*places)) == words


def test_a_rank_that_has_left_no_heartbeat_is_named() -> None:
    found = beats((1, "loss"), (1, "loss"), (1, "loss"))
    del found[1]
    assert describe(3, set(), found) == ("rank 1 has left no heartbeat; ranks 0, 2 wait for it")
