"""Reports of training steps: metrics, sample numbers, and replaced samples.

Every rank must call these functions; only rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gigabatch.data.shards.quarantine import Substitution, check_damage_rate, count_by_source
from gigabatch.data.stream import MicroBatch
from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.inputs import TrainData
from gigabatch.trainer.monitoring.counters import Counts
from gigabatch.trainer.monitoring.metrics import Monitor
from gigabatch.trainer.monitoring.step_result import StepResult
from gigabatch.trainer.run.folder import RunFolder


@dataclass
class Clock:
    """Time and steps since the last line of metrics.

    Attributes:
        since: Monotonic time of the last line, in seconds.
        steps: Steps since then.
        waited: Seconds since then for which training waited for data.
    """

    since: float = field(default_factory=time.monotonic)
    steps: int = 0
    waited: float = 0.0

    def rates(self, global_size: int) -> dict[str, float]:
        """Return the rates since the last call, and reset the clock."""
        elapsed = max(time.monotonic() - self.since, 1e-9)
        rates = {
            "perf/samples_per_s": self.steps * global_size / elapsed,
            "perf/step_s": elapsed / max(self.steps, 1),
            "data/wait_fraction": self.waited / elapsed,
        }
        self.since, self.steps, self.waited = time.monotonic(), 0, 0.0
        return rates


class Reporter:
    """Reports one attempt, which starts after `counts.done` steps."""

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        world: World,
        attempt: int,
        data: TrainData,
        counts: Counts,
    ) -> None:
        self.config, self.world, self.data, self.counts = config, world, data, counts
        self.clock = Clock()
        self.first = counts.done + 1
        self.monitor: Monitor | None = None
        if world.is_main:
            self.monitor = Monitor(run, attempt, counts.done + 1, config.train.steps)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics.jsonl, and the same to TensorBoard."""
        if self.monitor:
            self.monitor.report(step, step * self.config.batch.global_size, metrics)

    def step(self, result: StepResult, lr: float, more: Mapping[str, float]) -> None:
        """Write and log the metrics of the last step.

        Args:
            result: Outcome of the step.
            lr: Learning rate of the towers.
            more: Further metrics.
        """
        if self.monitor is None:
            return
        counts = self.counts
        metrics = {
            "train/loss": result.loss,
            **{f"train/{name}": value for name, value in result.metrics.items()},
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/skipped_steps": float(counts.skipped),
            "data/bad_samples": float(counts.bad_samples.total()),
            **self._epochs(),
            **self.clock.rates(self.config.batch.global_size),
            **more,
        }
        self.write(counts.done, metrics)
        self.monitor.progress(counts.done, metrics)

    def log_first(self, result: StepResult) -> None:
        """Log the first step of an attempt, whose metrics are not due yet."""
        if self.monitor:
            elapsed = time.monotonic() - self.clock.since
            self.monitor.log_first(self.counts.done, result.loss, elapsed)

    def samples(self, batch: Sequence[MicroBatch]) -> None:
        """Record the sample numbers of the last step, in batch order.

        Collective: every rank must call it.
        """
        local = [(m.number, m.tensors["sample"].tolist()) for m in batch if m.real]
        micro_batches = sorted(micro for rank in self.world.gather(local) for micro in rank)
        if self.monitor:
            samples = [n for _, numbers in micro_batches for n in numbers]
            self.monitor.samples(self.counts.done, samples)

    def bad_samples(self, bad: Sequence[Substitution]) -> None:
        """Count and record replaced samples. Collective: every rank must call it.

        Raises:
            GigabatchError: if they exceed `data.max_damaged`.
        """
        replaced = [sample for rank in self.world.gather(bad) for sample in rank]
        self.counts.bad_samples += count_by_source(replaced)
        if self.monitor:
            self.monitor.quarantine(replaced)
        names = {i: index.source for i, index in enumerate(self.data.indexes)}
        drawn = dict(enumerate(self._drawn().tolist()))
        most = self.config.data.max_damaged
        example = replaced[0].why if replaced else ""
        check_damage_rate(self.counts.bad_samples, drawn, names, most, example)

    def _drawn(self) -> NDArray[np.int64]:
        """Return the samples drawn so far, int64 [sources]."""
        return self.data.mixture.samples_before(self.counts.done * self.config.batch.global_size)

    def _epochs(self) -> dict[str, float]:
        """Return the number of completed epochs of each source."""
        epochs = [
            n / len(i) for n, i in zip(self._drawn().tolist(), self.data.indexes, strict=True)
        ]
        if len(epochs) == 1:
            return {"data/epoch": epochs[0]}
        return {f"data/epoch/{name}": e for name, e in zip(self.data.names, epochs, strict=True)}

    def flush(self) -> None:
        """Sync all files to disk."""
        if self.monitor:
            self.monitor.flush()

    def close(self) -> None:
        """Close all files."""
        if self.monitor:
            self.monitor.close()
