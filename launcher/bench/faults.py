"""Command `gigabatch bench faults`: kill a run's processes at random and compare the result.

The disturbed run and an undisturbed one train the same small towers with two workers under
torchrun. They must agree in every loss bit for bit and in the samples of every step.
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
from gigabatch.launcher.bench.rank_processes import process_tree, rank_processes
from gigabatch.trainer.monitoring.metrics import read_metrics, read_samples
from gigabatch.trainer.run.folder import RunFolder

Say = Callable[[str], None]
CHECKPOINT_STEPS = 4
"""Steps between checkpoints."""
WAIT_TIMEOUT_S = 300.0
"""Seconds within which the run must reach the next kill; otherwise the benchmark fails."""
KILL_KINDS = RANK, EVERYTHING, SAVE = "a rank", "everything", "everything, in a save"
"""Kinds of kill: one rank; the launcher and all its descendants; the same during a save."""

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
    """One kill: its kind `how`, and its `time` in seconds since the epoch."""

    how: str
    time: float


def bench_faults(kills: int, seed: int, zero: int, out: Path | None, say: Say) -> int:
    """Train both runs and compare them.

    Args:
        kills: Number of kills.
        seed: Seed for kill times and target processes.
        zero: DeepSpeed ZeRO stage.
        out: Folder for `faults.json` and `faults.md`; None writes no files.
        say: Prints a line.

    Returns:
        0 if the runs agree, else 1.

    Raises:
        GigabatchError: if a run fails without being killed.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gigabatch-faults-") as name:
        folder = Path(name)
        config = _write_config(folder, steps=2 * CHECKPOINT_STEPS * (kills + 1), zero=zero)
        names = ("undisturbed", "disturbed")
        undisturbed, disturbed = (RunFolder(folder / "runs" / name) for name in names)
        say("training the undisturbed run")
        start = time.monotonic()
        with _start("train", config, "run.name=undisturbed") as command:
            command.wait_for_end()
        elapsed = time.monotonic() - start
        steps = undisturbed.config().train.steps
        say(f"{steps} steps in {elapsed:.0f} s; training the run with {kills} kills")
        done = _train_with_kills(disturbed, config, kills, random.Random(seed), say)
        costs = [_cost(disturbed.metrics, kill) for kill in done]
        losses, samples = _losses(undisturbed), read_samples(undisturbed.samples)
        agreement = {
            "losses_equal": losses == _losses(disturbed),
            "samples_equal": samples == read_samples(disturbed.samples),
        }
    results = {
        "command": f"gigabatch bench faults --kills {kills} --seed {seed} --zero {zero}",
        "processor": processor(), "cores": len(os.sched_getaffinity(0)),
        "date": date.today().isoformat(), "steps": len(losses),
        "samples": sum(map(len, samples.values())), "undisturbed_s": round(elapsed, 1), **agreement,
        "kills": [{"how": kill.how} | cost for kill, cost in zip(done, costs, strict=True)],
    }  # fmt: skip
    report = _report(results)
    say(report)
    if out is not None:
        (out / "faults.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "faults.md").write_text(report + "\n")
    return 0 if all(agreement.values()) else 1


def _write_config(folder: Path, steps: int, zero: int) -> Path:
    synthesize(folder / "shards", "8k", samples=512)
    path = folder / "faults.yaml"
    settings = {"root": folder / "shards", "runs": folder / "runs"}
    path.write_text(CONFIG.format(**settings, steps=steps, zero=zero, every=CHECKPOINT_STEPS))
    return path


class _Command:
    """A `gigabatch` process with its workers and their loaders."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process, self.output = process, output

    def wait_until(self, condition: Callable[[], object], goal: str) -> None:
        """Wait for a condition; raise if the process ends first, or the timeout passes."""
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while not condition():
            if self.process.poll() is not None:
                raise GigabatchError(f"the run ended before it could {goal}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise GigabatchError(
                    f"the run did not {goal} within {WAIT_TIMEOUT_S:.0f} s:\n{self._tail()}"
                )
            time.sleep(0.02)

    def wait_for_end(self) -> None:
        """Wait for the process to end; raise if its exit code is not 0."""
        if self.process.wait() != 0:
            raise GigabatchError(f"the run failed without being killed:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-20:])


@contextmanager
def _start(*arguments: str | Path) -> Iterator[_Command]:
    """Run `gigabatch ARGUMENTS`; on exit, kill it and all its descendants."""
    with tempfile.NamedTemporaryFile(suffix=".log") as output:
        command = [sys.executable, "-m", "gigabatch.launcher", *map(str, arguments)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield _Command(process, Path(output.name))
        finally:
            _kill(process_tree(process.pid))
            process.wait()


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)


def _train_with_kills(
    run: RunFolder, config: Path, kills: int, rng: random.Random, say: Say
) -> list[Kill]:
    """Train `run` to its end, killing processes `kills` times."""
    kinds = [KILL_KINDS[number % len(KILL_KINDS)] for number in range(kills)]
    rng.shuffle(kinds)
    done: list[Kill] = []
    arguments: tuple[str | Path, ...] = ("train", config, "run.name=disturbed")
    while True:
        with _start(*arguments) as command:
            while len(done) < kills:
                how = kinds[len(done)]
                done.append(_kill_once(command, run, how, rng))
                say(f"kill {len(done)} of {kills}: {how}, after step {_last_step(run)}")
                if how != RANK:  # torchrun restarts the ranks unless it was killed itself.
                    break
            else:
                command.wait_for_end()
                return done
        arguments = ("resume", run.path)


def _kill_once(command: _Command, run: RunFolder, how: str, rng: random.Random) -> Kill:
    """Wait for a random time, then kill processes."""
    step = _last_step(run) + rng.randint(1, CHECKPOINT_STEPS + 2)
    command.wait_until(lambda: _last_step(run) >= step, f"reach step {step}")
    time.sleep(rng.random() * 0.2)
    if how == SAVE:
        # Match only files of this attempt; earlier kills may have left files of others.
        pattern = f".step-*.{run.attempts():06d}.tmp"
        command.wait_until(lambda: any(run.checkpoints.glob(pattern)), "save")
    launcher = command.process.pid
    targets = process_tree(launcher)
    if how == RANK:
        command.wait_until(lambda: rank_processes(launcher), "start its ranks")
        targets = [rng.choice(rank_processes(launcher))]
    kill_time = time.time()
    _kill(targets)
    return Kill(how, kill_time)


def _loss_lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(path) if "train/loss" in line] if path.exists() else []


def _last_step(run: RunFolder) -> int:
    return max((line["step"] for line in _loss_lines(run.metrics)), default=0)


def _losses(run: RunFolder) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in _loss_lines(run.metrics)}


def _cost(metrics: Path, kill: Kill) -> dict[str, float]:
    """Compute the cost of a kill.

    Args:
        metrics: `metrics.jsonl` of the disturbed run.
        kill: The kill.

    Returns:
        `after_step`, the last step finished before the kill; `to_next_s`, seconds from the kill to
        the next finished step; `repeated`, number of steps trained again.
    """
    lines = []
    for text in metrics.read_text().splitlines():  # Includes steps that a resume made void.
        with suppress(ValueError):
            # Lines about checkpoints appear some steps after the step they name.
            if "train/loss" in (line := json.loads(text)):
                lines.append(line)
    before = [line for line in lines if line["time"] <= kill.time]
    after = next(line for line in lines if line["time"] > kill.time)
    last_step = before[-1]["step"] if before else 0
    return {
        "after_step": last_step,
        "to_next_s": round(after["time"] - kill.time, 1),
        "repeated": last_step + 1 - after["step"],
    }


def _report(results: dict[str, Any]) -> str:
    lines = [
        f"`{results['command']}`, {results['processor']}, {results['cores']} cores, "
        f"{results['date']}: {results['steps']} steps, {results['samples']:,} samples, 2 workers.",
        "",
        f"- {'PASS' if results['losses_equal'] else 'FAIL'}  losses equal bit for bit",
        f"- {'PASS' if results['samples_equal'] else 'FAIL'}  samples of every step equal",
        "",
        "| killed | times | s to the next step: median, max | steps repeated: mean, max |",
        "|---|---|---|---|",
    ]
    for how in KILL_KINDS:
        kills = [kill for kill in results["kills"] if kill["how"] == how]
        if kills:
            waits = [kill["to_next_s"] for kill in kills]
            repeated = [kill["repeated"] for kill in kills]
            lines.append(
                f"| {how} | {len(kills)} | {median(waits):.1f}, {max(waits):.1f} | "
                f"{sum(repeated) / len(repeated):.1f}, {max(repeated)} |"
            )
    return "\n".join(lines)
