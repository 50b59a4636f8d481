"""`gigabatch bench faults`: a run whose processes are killed at random, beside an undisturbed one.

Both train the same small towers with two workers under torchrun. What must hold: every loss equal
to the last bit, and every step trained on the same samples, none lost and none repeated.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from gigabatch.data.bench.shards import synthesize
from gigabatch.data.errors import GigabatchError
from gigabatch.kernels.bench.machine import processor
from gigabatch.launcher.bench.rank_processes import everything_below, ranks_below
from gigabatch.trainer.monitoring.metrics import read_metrics, read_samples
from gigabatch.trainer.run.folder import RunFolder

Say = Callable[[str], None]
EVERY = 4
"""Steps between checkpoints."""
PATIENCE_S = 300.0
"""A run that makes no step for so long is at fault itself."""
HOW = RANK, EVERYTHING, SAVE = "a rank", "everything", "everything, in a save"

CONFIG = """
data:
  root: {root}
  train: .
  image: {{size: 32}}
  text: {{vocab_size: 300, length: 12}}
  augment: {{rotate: 10, flip: 0.5, noise: 0.05}}
batch: {{global_size: 32, micro_size: 8}}
towers:
  width: 32
  image: {{kind: conv, widths: [16, 32], depths: [1, 1], dropout: 0.1}}
  text: {{kind: conv, width: 32, dropout: 0.1}}
train: {{steps: {steps}, zero_stage: {zero}}}
checkpoint: {{every_steps: {every}}}
monitor: {{every_steps: 1, record_samples: true}}
cluster: {{launcher: torchrun, workers: 2, threads: 1, max_restarts: 1000}}
run: {{dir: {runs}}}
"""


@dataclass(frozen=True)
class Kill:
    """One kill, `time` in seconds since the epoch."""

    how: str
    time: float


def bench_faults(kills: int, seed: int, zero: int, out: Path | None, say: Say) -> int:
    """Run both, say what was found, write it into `out`; 0 where they agree, else 1.

    Raises GigabatchError where a run fails by itself.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gigabatch-faults-") as name:
        folder = Path(name)
        config = _set_up(folder, steps=2 * EVERY * (kills + 1), zero=zero)
        whole, disturbed = (RunFolder(folder / "runs" / each) for each in ("whole", "disturbed"))
        say("training undisturbed")
        began = time.monotonic()
        with _started("train", config, "run.name=whole") as run:
            run.wait_for_end()
        took = time.monotonic() - began
        say(f"{whole.config().train.steps} steps in {took:.0f} s; now with {kills} kills")
        done = _disturb(disturbed, config, kills, random.Random(seed), say)
        lost = [_cost(disturbed.metrics, kill) for kill in done]
        agree = {
            "losses_equal": _losses(whole) == _losses(disturbed),
            "samples_equal": read_samples(whole.samples) == read_samples(disturbed.samples),
        }
        steps, samples = len(_losses(whole)), sum(map(len, read_samples(whole.samples).values()))
    found = {
        "command": f"gigabatch bench faults --kills {kills} --seed {seed} --zero {zero}",
        "processor": processor(), "cores": len(os.sched_getaffinity(0)),
        "date": date.today().isoformat(), "steps": steps, "samples": samples,
        "undisturbed_s": round(took, 1), **agree,
        "kills": [{"how": kill.how} | cost for kill, cost in zip(done, lost, strict=True)],
    }  # fmt: skip
    report = _report(found)
    say(report)
    if out is not None:
        (out / "faults.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "faults.md").write_text(report + "\n")
    return 0 if all(agree.values()) else 1


def _set_up(folder: Path, steps: int, zero: int) -> Path:
    synthesize(folder / "shards", "8k", samples=512)
    path = folder / "faults.yaml"
    settings = {"root": folder / "shards", "runs": folder / "runs"}
    path.write_text(CONFIG.format(**settings, steps=steps, zero=zero, every=EVERY))
    return path


class _Started:
    """A `gigabatch` process, its workers and their loaders."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path) -> None:
        self.process, self.said = process, said

    def wait(self, true: Callable[[], object], what: str) -> None:
        """Until something is true. Raises GigabatchError if the process ends before, or nothing
        comes of it."""
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            if self.process.poll() is not None:
                raise GigabatchError(f"the run ended before it could {what}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise GigabatchError(
                    f"the run did not {what} within {PATIENCE_S:.0f} s:\n{self._tail()}"
                )
            time.sleep(0.02)

    def wait_for_end(self) -> None:
        """Raises GigabatchError where it fails."""
        if self.process.wait() != 0:
            raise GigabatchError(f"the run failed by itself:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.said.read_text(errors="replace").splitlines()[-20:])


@contextmanager
def _started(*arguments: str | Path) -> Iterator[_Started]:
    """`gigabatch ARGUMENTS`; nothing of it is left at the end."""
    with tempfile.NamedTemporaryFile(suffix=".log") as said:
        command = [sys.executable, "-m", "gigabatch.launcher", *map(str, arguments)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        started = _Started(process, Path(said.name))
        try:
            yield started
        finally:
            _kill(everything_below(process.pid))
            process.wait()


def _kill(processes: list[psutil.Process]) -> None:
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)


def _disturb(
    run: RunFolder, config: Path, kills: int, moments: random.Random, say: Say
) -> list[Kill]:
    """Train `run` to its end through so many kills."""
    ways = [HOW[number % len(HOW)] for number in range(kills)]
    moments.shuffle(ways)
    done: list[Kill] = []
    command: tuple[str | Path, ...] = ("train", config, "run.name=disturbed")
    while True:
        with _started(*command) as process:
            while len(done) < kills:
                how = ways[len(done)]
                done.append(_one_kill(process, run, how, moments))
                say(f"kill {len(done)} of {kills}: {how}, after step {_last_step(run)}")
                if how != RANK:
                    break
            else:
                process.wait_for_end()
                return done
        command = ("resume", run.path)


def _one_kill(process: _Started, run: RunFolder, how: str, moments: random.Random) -> Kill:
    """Wait for a moment, then kill. (torchrun starts the ranks again where it is left.)"""
    step = _last_step(run) + moments.randint(1, EVERY + 2)
    process.wait(lambda: _last_step(run) >= step, f"reach step {step}")
    time.sleep(moments.random() * 0.2)
    if how == SAVE:
        now = f".step-*.{run.attempts():06d}.tmp"  # others were left by earlier kills
        process.wait(lambda: any(run.checkpoints.glob(now)), "save")
    launcher = process.process.pid
    victims = everything_below(launcher)
    if how == RANK:
        process.wait(lambda: ranks_below(launcher), "start its ranks")
        victims = [moments.choice(ranks_below(launcher))]
    killed = time.time()
    _kill(victims)
    return Kill(how, killed)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(path) if "train/loss" in line] if path.exists() else []


def _last_step(run: RunFolder) -> int:
    return max((line["step"] for line in _lines(run.metrics)), default=0)


def _losses(run: RunFolder) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in _lines(run.metrics)}


def _cost(metrics: Path, kill: Kill) -> dict[str, float]:
    """`to_next_s`: from a kill to the next finished step; `repeated`: steps trained again."""
    lines = []
    for text in metrics.read_text().splitlines():  # voided ones too
        with suppress(ValueError):
            if "train/loss" in (line := json.loads(text)):  # a checkpoint's come some steps later
                lines.append(line)
    before = [line for line in lines if line["time"] <= kill.time]
    after = next(line for line in lines if line["time"] > kill.time)
    at = before[-1]["step"] if before else 0
    return {
        "after_step": at,
        "to_next_s": round(after["time"] - kill.time, 1),
        "repeated": at + 1 - after["step"],
    }


def _report(found: dict[str, Any]) -> str:
    lines = [
        f"`{found['command']}`, {found['processor']}, {found['cores']} cores, {found['date']}: "
        f"{found['steps']} steps, {found['samples']:,} samples, two workers.",
        "",
        f"- losses equal to the last bit: {'yes' if found['losses_equal'] else 'NO'}",
        f"- samples of every step equal: {'yes' if found['samples_equal'] else 'NO'}",
        "",
        "| killed | times | s to the next step: median, most | steps repeated: mean, most |",
        "|---|---|---|---|",
    ]
    for how in HOW:
        of = [kill for kill in found["kills"] if kill["how"] == how]
        if of:
            waits, again = [k["to_next_s"] for k in of], [k["repeated"] for k in of]
            lines.append(
                f"| {how} | {len(of)} | {median(waits):.1f}, {max(waits):.1f} | "
                f"{sum(again) / len(again):.1f}, {max(again)} |"
            )
    return "\n".join(lines)
