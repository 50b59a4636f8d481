"""A watchdog against hangs: which rank is behind, in which step and phase, and with what stack.

Each rank's thread writes a heartbeat into the run folder. A stopped process beats no more; one
whose main thread is stuck beats on in the same place. Where a rank makes no progress for
`train.hang_timeout_s`, its thread compares all heartbeats, leaves stacks and a message, and ends
the process, so that whoever started the group starts it again.

heartbeats/attempt-000001-rank-0.json   hangs/attempt-000001-rank-0.txt
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gigabatch.trainer.distributed import World
from gigabatch.trainer.monitoring.metrics import format_duration
from gigabatch.trainer.monitoring.progress import PHASES, Progress
from gigabatch.trainer.run.folder import RunFolder

HUNG = 1
"""Exit code of a rank that found the run hanging."""
SLOWEST = 10.0  # seconds between heartbeats, at most
PATIENCE = 30.0  # seconds that the other ranks leave the one that speaks for all


@dataclass(frozen=True)
class Heartbeat:
    """`number` grows with each beat. `progress`: wall time of the last sign of progress.
    `started`: when the process began, in the kernel's ticks: a pid alone may be another's by now.
    """

    rank: int
    host: str
    pid: int
    started: str
    number: int
    step: int
    phase: str
    progress: float

    @property
    def place(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


Heartbeats = Mapping[int, Heartbeat]


@contextmanager
def watching(
    run: RunFolder, attempt: int, world: World, progress: Progress, hang_after: float
) -> Iterator[None]:
    """Watch this rank and, where it hangs, the others. `hang_after` seconds; 0: not at all."""
    if not hang_after:
        yield
        return
    watchdog = _Watchdog(run, attempt, world, progress, hang_after)
    watchdog.thread.start()
    try:
        yield
    finally:
        watchdog.ended.set()
        watchdog.thread.join(timeout=5)
        watchdog.file(world.rank).unlink(missing_ok=True)


class _Watchdog:
    def __init__(
        self, run: RunFolder, attempt: int, world: World, progress: Progress, hang_after: float
    ) -> None:
        self.run, self.attempt, self.world = run, attempt, world
        self.progress, self.hang_after = progress, hang_after
        self.interval = min(max(hang_after / 20, 0.1), SLOWEST)
        self.number, self.frozen, self.frozen_at = 0, 0.0, 0.0
        self.me = (world.rank, platform.node(), os.getpid(), _started(os.getpid()))
        self.heartbeats, self.hangs = run.path / "heartbeats", run.path / "hangs"
        self.heartbeats.mkdir(exist_ok=True)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def file(self, rank: int) -> Path:
        return self.heartbeats / f"attempt-{self.attempt:06d}-rank-{rank}.json"

    def _watch(self) -> None:
        self._forget_earlier_attempts()
        while self._beat_and_wait():
            if self._idle() > self.hang_after and self._is_hang():
                return

    def _forget_earlier_attempts(self) -> None:
        if self.world.is_main:
            for path in self.heartbeats.glob("attempt-*.json"):
                if int(path.name.split("-")[1]) < self.attempt:
                    path.unlink(missing_ok=True)

    def _beat_and_wait(self) -> bool:
        """One heartbeat; false once training has ended."""
        self.number += 1
        at = self.progress
        self.own = Heartbeat(*self.me, self.number, at.step, at.phase, at.wall)
        fresh = self.file(self.world.rank).with_suffix(".tmp")
        with suppress(OSError):  # a full disk is others' to tell; the next beat tries again
            fresh.write_text(json.dumps(asdict(self.own)))
            os.replace(fresh, self.file(self.world.rank))
        began = time.monotonic()
        ended = self.ended.wait(self.interval)
        late = time.monotonic() - began - self.interval
        if late > 2 * self.interval:  # this whole process was stopped, and goes on
            self.frozen, self.frozen_at = late, self.progress.since
        return not ended

    def _idle(self) -> float:
        """Seconds in which this process ran and its main thread made no progress."""
        since = self.progress.since
        frozen = self.frozen if self.frozen and self.frozen_at == since else 0.0
        return time.monotonic() - since - frozen

    def _is_hang(self) -> bool:
        """Tell and end this process; false where the run went on, or was given up, meanwhile."""
        since, before = self.progress.since, self._read()
        mine = self._dump_own_stacks()
        for _ in range(3):
            if not self._beat_and_wait():
                return True
        if self.progress.since != since:
            mine.unlink(missing_ok=True)
            return False
        after = self._read()
        try:
            if self.run.owned_by(self.attempt):
                stopped = stopped_ranks(before, after)
                self._end_of(stopped, after, describe(self.world.size, stopped, after))
        finally:  # whatever a full or broken disk does to the message
            os._exit(HUNG)

    def _read(self) -> Heartbeats:
        found = {self.world.rank: self.own}
        for rank in set(range(self.world.size)) - {self.world.rank}:
            with suppress(OSError, ValueError, TypeError):
                found[rank] = Heartbeat(**json.loads(self.file(rank).read_text()))
        return found

    def _end_of(self, stopped: set[int], beats: Heartbeats, message: str) -> None:
        """The first rank that still runs speaks for all, the first of each host cleans up there."""
        running = [rank for rank in sorted(beats) if rank not in stopped]
        here = [rank for rank in running if beats[rank].host == self.me[1]]
        if self.world.rank == running[0]:
            self._tell(message)
        if self.world.rank == here[0]:
            for rank in stopped:
                self._bury(beats[rank])
        if self.world.rank != running[0]:
            # Its exit ends the group; ours would end it before it has told all.
            time.sleep(PATIENCE)

    def _tell(self, message: str) -> None:
        text = f"no progress for {format_duration(self.hang_after)}: {message}"
        text += f". Stacks: {self.hangs}"
        with suppress(OSError):
            print(f"gigabatch: {text}", file=sys.stderr, flush=True)
        with suppress(OSError):
            self.run.record_crash(text)
        with suppress(OSError), open(self.run.log, "a", encoding="utf-8") as file:
            file.write(time.strftime("%Y-%m-%d %H:%M:%S E ") + text + "\n")

    def _dump_own_stacks(self) -> Path:
        path = self._stacks(self.world.rank)
        with suppress(OSError):  # nor must a full disk keep the hang from being ended
            self.hangs.mkdir(exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"step {self.progress.step}, phase {self.progress.phase}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        return path

    def _stacks(self, rank: int) -> Path:
        return self.hangs / f"attempt-{self.attempt:06d}-rank-{rank}.txt"

    def _bury(self, beat: Heartbeat) -> None:
        """Leave the stacks of a stopped process of this host, where py-spy can read them, and kill
        it: SIGTERM, which a launcher would send first, does not reach it."""
        if beat.host != self.me[1] or beat.started != _started(beat.pid):
            return
        if spy := shutil.which("py-spy"):
            command = [spy, "dump", "--nonblocking", "--pid", str(beat.pid)]
            with suppress(OSError, subprocess.TimeoutExpired):
                found = subprocess.run(command, capture_output=True, text=True, timeout=10)
                self._stacks(beat.rank).write_text(
                    f"step {beat.step}, phase {beat.phase}\n{found.stdout}{found.stderr}"
                )
        with suppress(ProcessLookupError, PermissionError):
            os.kill(beat.pid, signal.SIGKILL)


def stopped_ranks(before: Heartbeats, after: Heartbeats) -> set[int]:
    """Ranks whose process did not beat between two readings some beats apart. (No clock is
    compared: hosts' clocks differ.)"""
    return {r for r, beat in after.items() if r in before and before[r].number == beat.number}


def describe(size: int, stopped: set[int], beats: Heartbeats) -> str:
    """Which of `size` ranks the others wait for, and where it is."""
    silent = [rank for rank in range(size) if rank not in beats]
    running = [rank for rank in sorted(beats) if rank not in stopped]
    last = min(beats[rank].place for rank in running)
    stuck = [rank for rank in running if beats[rank].place == last]
    if len(stuck) == size:
        who = f"all {size} ranks are" if size > 1 else f"{beats[0]} is"
        return f"{who} in {_where(beats[0])}, since {_ago(beats[0])}"
    if silent or stopped:
        stuck = []  # what they are at, they wait in
    parts = [
        *(f"rank {rank} has left no heartbeat" for rank in silent),
        *(_standing(beats[rank], "stopped") for rank in sorted(stopped)),
        *(_standing(beats[rank], "is stuck") for rank in stuck),
    ]
    if waiting := [rank for rank in running if rank not in stuck]:
        parts.append(_waiting(waiting))
    return "; ".join(parts)


def _standing(beat: Heartbeat, how: str) -> str:
    return f"{beat} {how} in {_where(beat)}, {_ago(beat)} ago"


def _where(beat: Heartbeat) -> str:
    return f"step {beat.step}, phase {beat.phase}"


def _ago(beat: Heartbeat) -> str:
    return format_duration(max(time.time() - beat.progress, 0))


def _waiting(ranks: Iterable[int]) -> str:
    named = sorted(ranks)
    if len(named) == 1:
        return f"rank {named[0]} waits for it"
    shown = ", ".join(map(str, named[:8])) + (", ..." if len(named) > 8 else "")
    return f"ranks {shown} wait for it"


def _started(pid: int) -> str:
    """When a process of this machine began; empty where it is gone or cannot be asked."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
