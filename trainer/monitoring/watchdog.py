"""Watchdog against hangs: reports which rank is behind, with its step, phase and stack.

A thread of each rank writes heartbeats to the run folder. A stopped process writes none; a process
whose main thread is stuck keeps writing the same step and phase. If a rank makes no progress for
`train.hang_timeout_s`, its thread compares all heartbeats, writes stacks and a message, and ends
the process, so that the launcher restarts the group.

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
"""Exit code of a rank that has detected a hang."""
MAX_INTERVAL_S = 10.0
"""Maximum seconds between two heartbeats."""
REPORT_TIME_S = 30.0
"""Seconds that the other ranks wait for the reporting rank before exiting."""


@dataclass(frozen=True)
class Heartbeat:
    """The state of one rank, as a file in heartbeats/.

    Attributes:
        rank: Number of the rank.
        host: Its host.
        pid: Its process.
        started: Start time of the process in kernel ticks, because its pid may be reused.
        number: Number of the heartbeat.
        step: Step in progress.
        phase: Phase in progress.
        progress: Wall-clock time of the last progress.
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
    def position(self) -> tuple[int, int]:
        """Step and phase in the order of training."""
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


Heartbeats = Mapping[int, Heartbeat]


@contextmanager
def watching(
    run: RunFolder, attempt: int, world: World, progress: Progress, timeout: float
) -> Iterator[None]:
    """Watch this rank; if it hangs, also examine the other ranks.

    Args:
        run: The run.
        attempt: Number of this attempt.
        world: This process and its group.
        progress: Progress of this rank.
        timeout: Seconds without progress that count as a hang; 0 disables the watchdog.
    """
    if not timeout:
        yield
        return
    watchdog = _Watchdog(run, attempt, world, progress, timeout)
    watchdog.thread.start()
    try:
        yield
    finally:
        watchdog.ended.set()
        watchdog.thread.join(timeout=5)
        watchdog.file(world.rank).unlink(missing_ok=True)


class _Watchdog:
    def __init__(
        self, run: RunFolder, attempt: int, world: World, progress: Progress, timeout: float
    ) -> None:
        self.run, self.attempt, self.world = run, attempt, world
        self.progress, self.timeout = progress, timeout
        self.interval = min(max(timeout / 20, 0.1), MAX_INTERVAL_S)
        self.number = 0
        # Seconds for which the process was suspended, and the time of the last progress before.
        self.suspended, self.suspended_at = 0.0, 0.0
        self.identity = (world.rank, platform.node(), os.getpid(), _started(os.getpid()))
        self.heartbeats, self.hangs = run.path / "heartbeats", run.path / "hangs"
        self.heartbeats.mkdir(exist_ok=True)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def file(self, rank: int) -> Path:
        """Return the heartbeat file of a rank."""
        return self.heartbeats / f"attempt-{self.attempt:06d}-rank-{rank}.json"

    def _watch(self) -> None:
        self._remove_earlier_attempts()
        while self._beat_and_wait():
            if self._idle() > self.timeout and self._handle_hang():
                return

    def _remove_earlier_attempts(self) -> None:
        if self.world.is_main:
            for path in self.heartbeats.glob("attempt-*.json"):
                if int(path.name.split("-")[1]) < self.attempt:
                    path.unlink(missing_ok=True)

    def _beat_and_wait(self) -> bool:
        """Write one heartbeat and wait an interval; return false once training has ended."""
        self.number += 1
        at = self.progress
        self.heartbeat = Heartbeat(*self.identity, self.number, at.step, at.phase, at.wall)
        fresh = self.file(self.world.rank).with_suffix(".tmp")
        # A full disk is reported elsewhere; the next heartbeat is another try.
        with suppress(OSError):
            fresh.write_text(json.dumps(asdict(self.heartbeat)))
            os.replace(fresh, self.file(self.world.rank))
        began = time.monotonic()
        ended = self.ended.wait(self.interval)
        late = time.monotonic() - began - self.interval
        if late > 2 * self.interval:  # The process was suspended and has resumed.
            self.suspended, self.suspended_at = late, self.progress.since
        return not ended

    def _idle(self) -> float:
        """Return the seconds without progress, without those in which the process was suspended."""
        since = self.progress.since
        suspended = self.suspended if self.suspended and self.suspended_at == since else 0.0
        return time.monotonic() - since - suspended

    def _handle_hang(self) -> bool:
        """Report the hang and end this process.

        Returns true if training has ended meanwhile, and false if the rank makes progress again.
        """
        since, before = self.progress.since, self._read_heartbeats()
        stacks = self._dump_stacks()
        for _ in range(3):
            if not self._beat_and_wait():
                return True
        if self.progress.since != since:
            stacks.unlink(missing_ok=True)
            return False
        after = self._read_heartbeats()
        try:
            if self.run.owned_by(self.attempt):
                stopped = stopped_ranks(before, after)
                self._end_group(stopped, after, describe(self.world.size, stopped, after))
        finally:  # Exit even if a full or broken disk prevents the report.
            os._exit(HUNG)

    def _read_heartbeats(self) -> Heartbeats:
        heartbeats = {self.world.rank: self.heartbeat}
        for rank in set(range(self.world.size)) - {self.world.rank}:
            with suppress(OSError, ValueError, TypeError):
                heartbeats[rank] = Heartbeat(**json.loads(self.file(rank).read_text()))
        return heartbeats

    def _end_group(self, stopped: set[int], beats: Heartbeats, message: str) -> None:
        """Report the hang and kill stopped processes.

        The first running rank reports. On each host, the first running rank kills stopped
        processes.
        """
        running = [rank for rank in sorted(beats) if rank not in stopped]
        here = [rank for rank in running if beats[rank].host == self.identity[1]]
        if self.world.rank == running[0]:
            self._report(message)
        if self.world.rank == here[0]:
            for rank in stopped:
                self._kill_stopped(beats[rank])
        if self.world.rank != running[0]:
            # Any exit ends the group; the reporting rank must finish first.
            time.sleep(REPORT_TIME_S)

    def _report(self, message: str) -> None:
        text = f"no progress for {format_duration(self.timeout)}: {message}"
        text += f". Stacks: {self.hangs}"
        with suppress(OSError):
            print(f"gigabatch: {text}", file=sys.stderr, flush=True)
        with suppress(OSError):
            self.run.record_crash(text)
        with suppress(OSError), open(self.run.log, "a", encoding="utf-8") as file:
            file.write(time.strftime("%Y-%m-%d %H:%M:%S E ") + text + "\n")

    def _dump_stacks(self) -> Path:
        """Write the stacks of this process to hangs/."""
        path = self._stacks_file(self.world.rank)
        with suppress(OSError):  # A full disk must not keep the hung process alive.
            self.hangs.mkdir(exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"step {self.progress.step}, phase {self.progress.phase}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        return path

    def _stacks_file(self, rank: int) -> Path:
        return self.hangs / f"attempt-{self.attempt:06d}-rank-{rank}.txt"

    def _kill_stopped(self, beat: Heartbeat) -> None:
        """Kill a stopped process of this host; first write its stacks, if py-spy is installed.

        A launcher sends SIGTERM first, which does not reach a stopped process.
        """
        if beat.host != self.identity[1] or beat.started != _started(beat.pid):
            return
        if spy := shutil.which("py-spy"):
            command = [spy, "dump", "--nonblocking", "--pid", str(beat.pid)]
            with suppress(OSError, subprocess.TimeoutExpired):
                dump = subprocess.run(command, capture_output=True, text=True, timeout=10)
                self._stacks_file(beat.rank).write_text(
                    f"step {beat.step}, phase {beat.phase}\n{dump.stdout}{dump.stderr}"
                )
        with suppress(ProcessLookupError, PermissionError):
            os.kill(beat.pid, signal.SIGKILL)


def stopped_ranks(before: Heartbeats, after: Heartbeats) -> set[int]:
    """Return the ranks without a new heartbeat between two readings.

    The numbers of heartbeats are compared, not their times, because hosts' clocks differ.
    """
    return {r for r, beat in after.items() if r in before and before[r].number == beat.number}


def describe(size: int, stopped: set[int], beats: Heartbeats) -> str:
    """Describe the ranks that the others wait for.

    Args:
        size: Number of ranks.
        stopped: Ranks whose process is stopped.
        beats: Latest heartbeats.
    """
    silent = [rank for rank in range(size) if rank not in beats]
    running = [rank for rank in sorted(beats) if rank not in stopped]
    last = min(beats[rank].position for rank in running)
    stuck = [rank for rank in running if beats[rank].position == last]
    if len(stuck) == size:
        who = f"all {size} ranks are" if size > 1 else f"{beats[0]} is"
        return f"{who} in {_where(beats[0])}, for {_idle_time(beats[0])}"
    if silent or stopped:
        stuck = []  # The running ranks wait for the others.
    parts = [
        *(f"rank {rank} wrote no heartbeat" for rank in silent),
        *(_state(beats[rank], "stopped") for rank in sorted(stopped)),
        *(_state(beats[rank], "is stuck") for rank in stuck),
    ]
    if waiting := [rank for rank in running if rank not in stuck]:
        parts.append(_waiting(waiting))
    return "; ".join(parts)


def _state(beat: Heartbeat, state: str) -> str:
    return f"{beat} {state} in {_where(beat)}, last progress {_idle_time(beat)} ago"


def _where(beat: Heartbeat) -> str:
    return f"step {beat.step}, phase {beat.phase}"


def _idle_time(beat: Heartbeat) -> str:
    return format_duration(max(time.time() - beat.progress, 0))


def _waiting(ranks: Iterable[int]) -> str:
    waiting = sorted(ranks)
    if len(waiting) == 1:
        return f"rank {waiting[0]} waits for it"
    shown = ", ".join(map(str, waiting[:8])) + (", ..." if len(waiting) > 8 else "")
    return f"ranks {shown} wait for it"


def _started(pid: int) -> str:
    """Return the start time of a local process in kernel ticks; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
