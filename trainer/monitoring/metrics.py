"""What a run shows while it trains: metrics.jsonl, TensorBoard, and one readable line in train.log.

Rank 0 alone writes. A line of metrics.jsonl is one flat object: `step`, `samples_seen`, `time`,
`attempt`, then tags (null where a value is not finite). The highest attempt wins, and attempt k
voids earlier attempts' lines from its first step on; `read_metrics` applies that.
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
SAID = 5
"""Bad samples that an attempt says in train.log; all are in quarantine.jsonl."""
PROGRESS = "step "  # how a progress line begins: a terminal shows only the newest


class Monitor:
    """Opened by rank 0 when an attempt starts after `first_step` - 1 steps."""

    def __init__(self, run: RunFolder, attempt: int, first_step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.attempt, self.steps = run, attempt, steps
        for path in (run.metrics, run.samples):
            _end_last_line(path)
        self.file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        _await_a_later_second(run.tensorboard)
        self.board = SummaryWriter(
            str(run.tensorboard),
            # Steps that an earlier attempt wrote after its last checkpoint are drawn again.
            purge_step=first_step if attempt > 1 else None,
            flush_secs=10,
        )
        self.bad = 0
        self.started, self.first_step = time.monotonic(), first_step

    def report(self, step: int, samples_seen: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics and the same scalars to TensorBoard."""
        if not self.run.owned_by(self.attempt):
            raise GigabatchError(f"{self.run.path}: a later attempt has taken this run over.")
        head = {"step": step, "samples_seen": samples_seen, "time": time.time()}
        known = {tag: value if math.isfinite(value) else None for tag, value in metrics.items()}
        line = json.dumps({**head, "attempt": self.attempt, **known}, allow_nan=False)
        self.file.write(line + "\n")
        self.file.flush()
        for tag, value in metrics.items():
            if math.isfinite(value):
                self.board.add_scalar(tag, value, step)

    def samples(self, step: int, numbers: Sequence[int]) -> None:
        """Append what a step trained on to samples.jsonl."""
        line = {"attempt": self.attempt, "step": step, "samples": numbers}
        with open(self.run.samples, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def quarantine(self, bad: Iterable[Substitution]) -> None:
        """Append samples that others stood in for to quarantine.jsonl, and say the first few."""
        with open(self.run.quarantine, "a", encoding="utf-8") as file:
            for each in bad:
                file.write(json.dumps({"attempt": self.attempt, **each.record()}) + "\n")
                self.bad += 1
                if self.bad <= SAID:
                    log.warning("replaced a sample that cannot be used: %s", each.why)
                if self.bad == SAID:
                    log.warning("further ones are in %s alone", self.run.quarantine)

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """One readable line: where the run is, how well, how fast, how much longer."""
        done = step - self.first_step + 1
        left = (self.steps - step) * (time.monotonic() - self.started) / done
        log.info(
            f"{PROGRESS}{step}/{self.steps}  ETA {format_duration(left)}  "
            f"loss {metrics['train/loss']:.4f}  {metrics['perf/samples_per_s']:,.0f} samples/s  "
            f"data wait {metrics['data/wait_fraction']:.0%}  lr {metrics['train/lr']:.1e}"
            + (f"  scale {metrics[scale]:.1f}" if (scale := "train/logit_scale") in metrics else "")
        )

    def flush(self) -> None:
        """Make everything so far durable; called before a checkpoint is committed, so that a
        resumed run never misses the lines before it."""
        self.board.flush()
        self.file.flush()
        os.fsync(self.file.fileno())
        for path in (self.run.samples, self.run.quarantine):
            if path.exists():
                sync_file(path)

    def close(self) -> None:
        self.board.close()
        self.file.close()


def _end_last_line(path: Path) -> None:
    """Where a kill has cut it short."""
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


def _await_a_later_second(folder: Path) -> None:
    """TensorBoard reads event files in the order of their names, which begin with the second they
    were made in: an attempt's file must not sort before that of the attempt it goes on from."""
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    wait = max(seconds, default=0) + 1 - time.time()
    if wait > 5:
        log.warning(
            f"{folder}: an earlier attempt's events are dated {format_duration(wait)} ahead of "
            "this machine's clock; TensorBoard will draw steps in the wrong order. "
            "Set the machines' clocks alike."
        )
    elif wait > 0:
        time.sleep(wait)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The valid lines of a metrics.jsonl, in order; a line cut short by a kill is left out."""
    # An attempt may begin with an evaluation of what it found, which voids nothing.
    return _valid(path, lambda line: "train/loss" in line)


def read_samples(path: Path) -> dict[int, list[int]]:
    """step -> the numbers of the samples that it trained on, of a samples.jsonl."""
    return {line["step"]: line["samples"] for line in _valid(path, lambda line: True)}


def _valid(path: Path, trained: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The lines that no later attempt voids, from its first `trained` line's step on."""
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

    def voided(line: dict[str, Any]) -> bool:
        later = (first for attempt, first in first_step.items() if attempt > line["attempt"])
        return any(line["step"] >= first for first in later)

    return [line for line in lines if not voided(line)]


def format_duration(seconds: float) -> str:
    """Such as 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
