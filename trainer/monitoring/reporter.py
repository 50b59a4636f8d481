"""What a training step reports: its metrics, its samples, and those that could not be used.

Every rank calls; rank 0 alone writes.
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
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.step import StepResult


@dataclass
class Clock:
    """Where the time between two lines of metrics went, in s."""

    since: float = field(default_factory=time.monotonic)
    steps: int = 0
    waited: float = 0.0

    def rates(self, global_size: int) -> dict[str, float]:
        """Of the steps since the last call."""
        elapsed = max(time.monotonic() - self.since, 1e-9)
        rates = {
            "perf/samples_per_s": self.steps * global_size / elapsed,
            "perf/step_s": elapsed / max(self.steps, 1),
            "data/wait_fraction": self.waited / elapsed,
        }
        self.since, self.steps, self.waited = time.monotonic(), 0, 0.0
        return rates


class Reporter:
    """Of one attempt, which begins where `counts` stand. Closed by whoever made it."""

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
        self.monitor: Monitor | None = None
        if world.is_main:
            self.monitor = Monitor(run, attempt, counts.done + 1, config.train.steps)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same in TensorBoard."""
        if self.monitor:
            self.monitor.report(step, step * self.config.batch.global_size, metrics)

    def step(self, result: StepResult, lr: float, more: Mapping[str, float]) -> None:
        """The metrics of the step just done and of the time since the last such line."""
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

    def samples(self, batch: Sequence[MicroBatch]) -> None:
        """What the step just done trained on. A collective."""
        own = [(m.number, m.tensors["sample"].tolist()) for m in batch if m.real]
        dealt = sorted(each for rank in self.world.gather(own) for each in rank)
        if self.monitor:
            self.monitor.samples(self.counts.done, [n for _, numbers in dealt for n in numbers])

    def bad_samples(self, bad: Sequence[Substitution]) -> None:
        """Count and record samples that others stood in for. A collective. Raises GigabatchError
        where they are too many."""
        found = [each for rank in self.world.gather(bad) for each in rank]
        self.counts.bad_samples += count_by_source(found)
        if self.monitor:
            self.monitor.quarantine(found)
        names = {i: index.source for i, index in enumerate(self.data.indexes)}
        drawn = dict(enumerate(self._drawn().tolist()))
        most = self.config.data.max_damaged
        check_damage_rate(self.counts.bad_samples, drawn, names, most)

    def _drawn(self) -> NDArray[np.int64]:
        """[sources] samples read of each so far."""
        return self.data.mixture.samples_before(self.counts.done * self.config.batch.global_size)

    def _epochs(self) -> dict[str, float]:
        """How often each source was gone through."""
        epochs = [
            n / len(i) for n, i in zip(self._drawn().tolist(), self.data.indexes, strict=True)
        ]
        if len(epochs) == 1:
            return {"data/epoch": epochs[0]}
        return {f"data/epoch/{name}": e for name, e in zip(self.data.names, epochs, strict=True)}

    def flush(self) -> None:
        if self.monitor:
            self.monitor.flush()

    def close(self) -> None:
        if self.monitor:
            self.monitor.close()
