"""Output of a run while it trains: metrics.jsonl, TensorBoard, and progress lines in train.log.

Only rank 0 writes. A line of metrics.jsonl is one flat object: `step`, `samples_seen`, `time`,
`attempt`, then tags (null for values that are not finite). Attempt k replaces earlier attempts'
lines from its first step on; `read_metrics` applies this.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.quarantine import Substitution
from gigabatch.trainer.run.files import sync_file
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
MAX_LOGGED = 5
"""Maximum number of unreadable samples per attempt in train.log; quarantine.jsonl lists all."""
PROGRESS = "step "
"""Prefix of progress lines; a terminal shows only the newest."""


class Monitor:
    """Writes the outputs of one attempt, on rank 0.

    Args:
        run: The run.
        attempt: Number of the attempt.
        first_step: First step that the attempt trains.
        steps: Total steps of the run.
    """

    def __init__(self, run: RunFolder, attempt: int, first_step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.attempt, self.steps = run, attempt, steps
        for path in (run.metrics, run.samples):
            _end_last_line(path)
        self.file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        _wait_for_next_second(run.tensorboard)
        self.board = SummaryWriter(
            str(run.tensorboard),
            # Hide the steps that an earlier attempt wrote after its last checkpoint.
            purge_step=first_step if attempt > 1 else None,
            flush_secs=10,
        )
        self.bad_samples = 0
        self.started, self.first_step = time.monotonic(), first_step

    def report(self, step: int, samples_seen: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics, and the same scalars to TensorBoard.

        Raises:
            GigabatchError: if a later attempt has started.
        """
        if not self.run.owned_by(self.attempt):
            raise GigabatchError(f"{self.run.path}: a later attempt trains this run.")
        head = {"step": step, "samples_seen": samples_seen, "time": time.time()}
        finite = {tag: value if math.isfinite(value) else None for tag, value in metrics.items()}
        line = json.dumps({**head, "attempt": self.attempt, **finite}, allow_nan=False)
        self.file.write(line + "\n")
        self.file.flush()
        for tag, value in metrics.items():
            if math.isfinite(value):
                self.board.add_scalar(tag, value, step)

    def samples(self, step: int, numbers: Sequence[int]) -> None:
        """Append the sample numbers of a step to samples.jsonl."""
        line = {"attempt": self.attempt, "step": step, "samples": numbers}
        with open(self.run.samples, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def quarantine(self, bad: Iterable[Substitution]) -> None:
        """Append replaced samples to quarantine.jsonl, and log the first few."""
        with open(self.run.quarantine, "a", encoding="utf-8") as file:
            for sample in bad:
                file.write(json.dumps({"attempt": self.attempt, **sample.record()}) + "\n")
                self.bad_samples += 1
                if self.bad_samples <= MAX_LOGGED:
                    log.warning("replaced an unreadable sample: %s", sample.why)
                if self.bad_samples == MAX_LOGGED:
                    log.warning("further replaced samples are listed in %s", self.run.quarantine)

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one readable line: step, remaining time, loss, speed, learning rate."""
        done = step - self.first_step + 1
        left = (self.steps - step) * (time.monotonic() - self.started) / done
        log.info(
            f"{PROGRESS}{step}/{self.steps}  ETA {format_duration(left)}  "
            f"loss {metrics['train/loss']:.4f}  {metrics['perf/samples_per_s']:,.0f} samples/s  "
            f"data wait {metrics['data/wait_fraction']:.0%}  lr {metrics['train/lr']:.1e}"
            + (f"  scale {metrics[scale]:.1f}" if (scale := "train/logit_scale") in metrics else "")
        )

    def log_first(self, step: int, loss: float, seconds: float) -> None:
        """Log one readable line of an attempt's first step, as a sign that it works.

        It has no speed or remaining time, because a first step is slower than the others.
        """
        log.info(f"{PROGRESS}{step}/{self.steps}  loss {loss:.4f}  first step {seconds:.1f} s")

    def flush(self) -> None:
        """Sync all files to disk.

        Called before a checkpoint is committed, so that a resumed run has all earlier lines.
        """
        self.board.flush()
        self.file.flush()
        os.fsync(self.file.fileno())
        for path in (self.run.samples, self.run.quarantine):
            if path.exists():
                sync_file(path)

    def close(self) -> None:
        """Close all files."""
        self.board.close()
        self.file.close()


def _end_last_line(path: Path) -> None:
    """Add a newline if a kill has truncated the last line."""
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


def _wait_for_next_second(folder: Path) -> None:
    """Wait until a new event file sorts after the existing ones.

    TensorBoard reads event files in the order of their names, which start with the second of their
    creation.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    wait = max(seconds, default=0) + 1 - time.time()
    if wait > 5:
        log.warning(
            f"{folder}: an earlier attempt's events are {format_duration(wait)} ahead of this "
            "machine's clock, so TensorBoard will draw steps in the wrong order. Synchronize the "
            "machines' clocks."
        )
    elif wait > 0:
        time.sleep(wait)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the valid lines of a metrics.jsonl, in order; truncated lines are left out."""
    # An attempt may start with an evaluation of the checkpoint that it resumes, which replaces no
    # line.
    return _valid_lines(path, lambda line: "train/loss" in line)


def read_samples(path: Path) -> dict[int, list[int]]:
    """Return the sample numbers of each step, from a samples.jsonl."""
    return {line["step"]: line["samples"] for line in _valid_lines(path, lambda line: True)}


def _valid_lines(path: Path, trained: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Return the lines that no later attempt replaces.

    An attempt replaces the lines of earlier attempts from the step of its first line that satisfies
    `trained`.
    """
    lines: list[dict[str, Any]] = []
    first_step: dict[int, int] = {}
    with open(path, encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            lines.append(line)
            if trained(line):
                first_step.setdefault(line["attempt"], line["step"])

    def replaced(line: dict[str, Any]) -> bool:
        later = (first for attempt, first in first_step.items() if attempt > line["attempt"])
        return any(line["step"] >= first for first in later)

    return [line for line in lines if not replaced(line)]


def format_duration(seconds: float) -> str:
    """Return a duration such as 42 s, 3 min 05 s or 2 h 10 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"
