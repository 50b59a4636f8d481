"""The training function: the same under Ray, torchrun, and in one process.

It reads everything from the run folder, goes on from the newest sound checkpoint, and leaves
checkpoints, metrics and evaluations there.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gigabatch.data.errors import GigabatchError
from gigabatch.data.quarantine import Bad, by_source, refuse_above_rate
from gigabatch.data.stream import MicroBatch, by_step
from gigabatch.data.tokenizer import load_tokenizer
from gigabatch.trainer.attempts import begin_attempt
from gigabatch.trainer.checkpoint import Checkpoint, Tensors, checkpoint_at, latest_checkpoint
from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World, join_world
from gigabatch.trainer.engine import Engine
from gigabatch.trainer.evaluation.retrieval import evaluate_retrieval
from gigabatch.trainer.initial import load_initial
from gigabatch.trainer.inputs import open_eval, open_train, plans_of, train_stream
from gigabatch.trainer.monitor import Monitor
from gigabatch.trainer.objectives import build_objective
from gigabatch.trainer.optim import lr_factor
from gigabatch.trainer.progress import Progress
from gigabatch.trainer.retention import save_is_due
from gigabatch.trainer.runfolder import RunFolder
from gigabatch.trainer.saving import Saver
from gigabatch.trainer.step import ExactStep, StepResult
from gigabatch.trainer.stragglers import Stragglers
from gigabatch.trainer.towers import build_towers
from gigabatch.trainer.watchdog import watching

log = logging.getLogger(__name__)
Stop = Callable[[], bool]


def run_training(run: RunFolder, stop: Stop = lambda: False) -> bool:
    """Train the run in `run` to its last step; false if `stop` (or a stop request in the folder)
    ended it early, after a checkpoint. Called on every rank.

    Raises GigabatchError for what the user can put right.
    """
    config = run.config()
    with join_world(config.cluster.threads) as world, log_to(run, world):
        attempt = begin_attempt(run, world)
        with run.fenced(attempt):
            return _Trainer(run, config, world, attempt).train(stop)


@contextmanager
def log_to(run: RunFolder, world: World) -> Iterator[None]:
    """Rank 0's messages go to train.log, from where whoever started the run shows them."""
    logger = logging.getLogger("gigabatch")
    handler = logging.FileHandler(run.log) if world.is_main else logging.NullHandler()
    line = "%(asctime)s %(levelname).1s %(message)s"
    handler.setFormatter(logging.Formatter(line, "%Y-%m-%d %H:%M:%S"))
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()


@dataclass
class _Clock:
    """Where the time between two lines of metrics went."""

    since: float = field(default_factory=time.monotonic)
    steps: int = 0
    waited: float = 0.0

    def rates(self, global_size: int) -> dict[str, float]:
        elapsed = max(time.monotonic() - self.since, 1e-9)
        rates = {
            "perf/samples_per_s": self.steps * global_size / elapsed,
            "perf/step_s": elapsed / max(self.steps, 1),
            "data/wait_fraction": self.waited / elapsed,
        }
        self.since, self.steps, self.waited = time.monotonic(), 0, 0.0
        return rates


class _Trainer:
    """One attempt on one rank. Sets up in order; the stages of `train` read top to bottom."""

    def __init__(self, run: RunFolder, config: Config, world: World, attempt: int) -> None:
        self.run, self.config, self.world, self.attempt = run, config, world, attempt
        self.data = open_train(config)
        self._agree_on_data()
        self.progress = Progress(world.device)
        self.done = self.bad_steps = self.skipped = self.rewinds = 0
        self.bad_samples: Counter[int] = Counter()  # of each source
        checkpoint = self._find_checkpoint()
        self._build(checkpoint)
        if checkpoint:
            self._restore_counts(checkpoint)
        self.saved_at, self.saved_step = time.monotonic(), self.done
        self.clock = _Clock()
        self.stragglers = Stragglers(world, self.progress)

    # --- state -------------------------------------------------------------------------------

    def _agree_on_data(self) -> None:
        """Another order of samples on one rank, or shards changed since the start, would lose
        samples in silence."""
        digests = self.world.gather(self.data.digest)
        known = self.world.share(self.run.data_digest()) or digests[0]
        others = [str(rank) for rank, digest in enumerate(digests) if digest != known]
        if others:
            raise GigabatchError(
                f"{self.run.path}: rank {', '.join(others)} finds other shards in "
                f"{', '.join(i.source for i in self.data.indexes)} than the run began with, or the "
                "same in another order. If shards were changed, restore them. If each node keeps "
                "an index of its own (remote or read-only shards), remove those in "
                "$GIGABATCH_CACHE/index, so that all are made alike."
            )

    def _find_checkpoint(self) -> Checkpoint | None:
        """Rank 0 verifies; the others read the one it chose."""
        found: Any = None
        if self.world.is_main:
            try:
                newest = latest_checkpoint(self.run)
                found = newest.step if newest else None
            except GigabatchError as error:
                found = str(error)
        found = self.world.share(found)
        if isinstance(found, str):
            raise GigabatchError(found)
        return None if found is None else checkpoint_at(self.run, found)

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """Towers, objective and engine as they stand in a checkpoint, or at the start."""
        config, world = self.config, self.world
        towers = build_towers(config, load_tokenizer(self.run.tokenizer).get_vocab_size())
        self.objective = build_objective(config.objective, world.device, config.data.group)
        if checkpoint:
            towers.load_state_dict(checkpoint.tensors("towers"), strict=True)
        elif config.train.init_from:
            load_initial(towers, config, world)
        self.engine = Engine(towers.to(world.device), config, world)
        self.step_fn = ExactStep(self.engine, self.objective, config, world, self.progress)
        if checkpoint:
            steps = checkpoint.state["optimizer_steps"]
            self.engine.load_moments(checkpoint.tensors("moments"), steps)
            self.step_fn.load_own_state(checkpoint.tensors("objective"), steps)

    def _restore_counts(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.done, self.skipped = checkpoint.step, state["skipped"]
        self.bad_steps, self.rewinds = state["bad_steps"], state.get("rewinds", 0)
        for source, count in state.get("bad_samples", {}).items():
            self.bad_samples[int(source)] = count

    def _rewind(self) -> None:
        """Back to the last checkpoint, but on with the next step. The outcome is saved at once: a
        resume must not depend on which checkpoint it finds."""
        self.saver.settle()  # the checkpoint in flight may be the one
        checkpoint = self._find_checkpoint()
        back = checkpoint.step if checkpoint else 0
        del self.engine, self.step_fn, self.objective
        gc.collect()  # room for the new ones
        self._build(checkpoint)
        self.rewinds, self.bad_steps = self.rewinds + 1, 0
        log.warning(
            "rewound to the checkpoint of step %d; on with step %d (rewind %d of at most %d)",
            back, self.done + 1, self.rewinds, self.config.train.max_rewinds,
        )  # fmt: skip
        if self.monitor:
            told = {"train/rewinds": self.rewinds, "train/voided_steps": self.done - back}
            self.monitor.report(self.done, self.done * self.config.batch.global_size, told)
        self._save()

    def _save(self) -> None:
        self.progress.enter("save")
        self.saver.save(self.done, self._snapshot)
        self.saved_at, self.saved_step = time.monotonic(), self.done

    def _snapshot(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Tensors by file, and the rest, as they are now: the next steps do not touch them."""
        towers, moments = self.engine.weights(), self.engine.moments()
        own = self.step_fn.own_state()
        files: dict[str, Tensors] = {"towers": towers, "moments": moments, "objective": own}
        state: dict[str, Any] = {
            "step": self.done,
            "samples_seen": self.done * self.config.batch.global_size,
            "optimizer_steps": self.engine.steps,
            "skipped": self.skipped,
            "bad_steps": self.bad_steps,
            "rewinds": self.rewinds,
            "bad_samples": dict(self.bad_samples),
            "data": self.data.digest,
            "attempt": self.attempt,
        }
        if self.monitor:
            self.monitor.flush()
        return files, state

    def _report_saved(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.monitor:
            self.monitor.report(step, step * self.config.batch.global_size, metrics)

    # --- the run -----------------------------------------------------------------------------

    def train(self, stop: Stop) -> bool:
        steps = self.config.train.steps
        self._announce()
        hang_after = self.config.train.hang_after_s
        self.progress.enter("data", self.done + 1)
        with ExitStack() as cleanup:
            cleanup.enter_context(
                watching(self.run, self.attempt, self.world, self.progress, hang_after)
            )
            self.monitor = None
            if self.world.is_main:
                self.monitor = Monitor(self.run, self.attempt, self.done + 1, steps)
                cleanup.callback(self.monitor.close)
                self.run.forget_evaluations_after(self.done)
            saving = (self.run, self.world, self.attempt, self.config.checkpoint)
            self.saver = cleanup.enter_context(Saver(*saving, self._report_saved))
            if not self._evaluate(stop, if_due=True):  # a stop or a kill may have come before it
                return self._stopped()
            for batch in self._batches():
                self._one_step(batch)
                bad = [each for micro in batch if micro.real for each in micro.bad]
                stopping, save_due, some_bad = self._decide(stop, bool(bad))
                if some_bad:
                    self._count_samples(bad)
                if save_due or self.done == steps:
                    self._save()
                if stopping and self.done < steps:
                    return self._stopped()
                if not self._evaluate(stop, if_due=True):
                    return self._stopped()
            if not self._evaluate(stop):
                return self._stopped()
            self.saver.settle()
        log.info("finished: %d steps", steps)
        return True

    def _stopped(self) -> bool:
        """Leave as asked; false."""
        if self.saved_step < self.done:
            self._save()
        self.saver.settle()
        if self.world.is_main:
            self.run.record_stop()
        log.info("stopped at step %d of %d, as asked", self.done, self.config.train.steps)
        return False

    def _announce(self) -> None:
        weights = sum(p.numel() for p in self.engine.named.values())
        batch, world = self.config.batch, self.world
        log.info(
            f"attempt {self.attempt}: {world.size} worker{'s' * (world.size > 1)} on "
            f"{world.device.type} (threads each: {torch.get_num_threads()}), "
            f"{weights / 1e6:.1f} M weights, {len(self.data):,} samples, "
            f"batch {batch.global_size:,} in micro-batches of {batch.micro_size:,}"
        )
        if self.done:
            log.info("going on after step %d", self.done)

    def _batches(self) -> Iterator[list[MicroBatch]]:
        world = self.world
        last = self.config.train.steps
        plans = plans_of(self.data, world.size, world.rank, self.done + 1, last)
        columns, on_gpu = self.objective.needs.columns, world.device.type == "cuda"
        stream = train_stream(self.data, plans, self.run.tokenizer, columns, on_gpu)
        batches = by_step(stream, plans.per_step)
        while True:
            began = time.monotonic()
            self.progress.enter("data", self.done + 1)
            batch = next(batches, None)
            self.clock.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def _one_step(self, batch: list[MicroBatch]) -> None:
        step = self.done + 1
        factor = lr_factor(step, self.config.train.steps, self.config.schedule)
        lr = self.config.optimizer.lr * factor
        result = self.step_fn(step, batch, lr)
        self.done, self.clock.steps = step, self.clock.steps + 1
        self._count_bad(result)
        if self.config.monitor.record_samples:
            self._record_samples(batch)
        if step % self.config.monitor.every_steps == 0 or step == self.config.train.steps:
            self._report(result, lr, self.stragglers.metrics(step))
        if self.bad_steps >= self.config.train.max_bad_steps:
            self._rewind_or_stop()

    def _record_samples(self, batch: list[MicroBatch]) -> None:
        own = [(m.number, m.tensors["sample"].tolist()) for m in batch if m.real]
        dealt = sorted(each for rank in self.world.gather(own) for each in rank)
        if self.monitor:
            self.monitor.samples(self.done, [n for _, numbers in dealt for n in numbers])

    def _count_bad(self, result: StepResult) -> None:
        self.bad_steps = 0 if result.applied else self.bad_steps + 1
        self.skipped += not result.applied
        if not result.applied:
            log.warning("step %d skipped: a loss or gradient is not finite", self.done)

    def _rewind_or_stop(self) -> None:
        settings = self.config.train
        if settings.on_bad_steps == "rewind" and self.rewinds < settings.max_rewinds:
            return self._rewind()
        self.saver.settle()
        after = f", after {self.rewinds} rewinds" if self.rewinds else ""
        raise GigabatchError(
            f"{self.run.path}: {self.bad_steps} steps in a row had a loss or gradient that is "
            f"not finite{after} (the last: step {self.done}; the last checkpoint: step "
            f"{self.saved_step}). Lower optimizer.lr, or lengthen schedule.warmup_steps."
        )

    def _count_samples(self, bad: list[Bad]) -> None:
        """Record samples that others stood in for; stop where they are too many."""
        found = [each for rank in self.world.gather(bad) for each in rank]
        self.bad_samples += by_source(found)
        if self.monitor:
            self.monitor.quarantine(found)
        names = {i: index.source for i, index in enumerate(self.data.indexes)}
        drawn = dict(enumerate(self._drawn().tolist()))
        refuse_above_rate(self.bad_samples, drawn, names, self.config.data.max_damaged)

    def _drawn(self) -> NDArray[np.int64]:
        """[sources] samples read of each so far."""
        return self.data.mixture.drawn(self.done * self.config.batch.global_size)

    def _epochs(self) -> dict[str, float]:
        """How often each source was gone through."""
        epochs = [
            n / len(i) for n, i in zip(self._drawn().tolist(), self.data.indexes, strict=True)
        ]
        if len(epochs) == 1:
            return {"data/epoch": epochs[0]}
        return {f"data/epoch/{name}": e for name, e in zip(self.data.names, epochs, strict=True)}

    def _report(self, result: StepResult, lr: float, more: dict[str, float]) -> None:
        if self.monitor is None:
            return
        size = self.config.batch.global_size
        metrics = {
            "train/loss": result.loss,
            **{f"train/{name}": value for name, value in result.metrics.items()},
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/skipped_steps": float(self.skipped),
            "data/bad_samples": float(self.bad_samples.total()),
            **self._epochs(),
            **self.clock.rates(size),
            **more,
        }
        self.monitor.report(self.done, self.done * size, metrics)
        self.monitor.progress(self.done, metrics)

    def _decide(self, stop: Stop, bad: bool) -> tuple[bool, bool, bool]:
        """Agreed by all ranks: stop now? save now? was any sample bad?"""
        settings = self.config.checkpoint
        minutes = (time.monotonic() - self.saved_at) / 60
        by_time = settings.every_minutes and minutes >= settings.every_minutes
        by_step = save_is_due(self.done, settings, self._evaluation_due())
        # A request stands until a streak of bad steps, which saves nothing, is over.
        asked = self.bad_steps == 0 and self.world.is_main and self.run.take_save_request()
        timed_here = self.world.is_main and (asked or bool(by_time))
        stopping, timed, some_bad, written = self.world.any(
            self._asked(stop), timed_here, bad, self.saver.over()
        )
        if written:
            self.saver.settle()
        # A streak of bad steps must not push the checkpoints before it out.
        return stopping, (timed or by_step) and self.bad_steps == 0, some_bad

    def _asked(self, stop: Stop) -> bool:
        self.progress.enter(self.progress.phase)  # asked once a step, or a micro-batch measured
        return stop() or (self.world.is_main and self.run.stop_requested())

    def _evaluate(self, stop: Stop, if_due: bool = False) -> bool:
        """Retrieval on each set; into eval/, metrics.jsonl and TensorBoard. False where a stop
        was asked for in the middle: then nothing of it is kept, and a resume measures again."""
        if not self.config.eval.sets or (if_due and not self._evaluation_due()):
            return True
        # Rank 0's word: on a shared file system the others may see an older folder.
        if self.world.share(self.run.evaluated(self.done)):
            return True
        self.engine.train(False)
        self.progress.enter("evaluate", self.done)
        began, found = time.monotonic(), self._measure(stop)
        self.engine.train(True)
        self.clock.since += time.monotonic() - began
        if found and self.monitor:
            self.monitor.report(self.done, self.done * self.config.batch.global_size, found)
            self.monitor.flush()
            self.run.write_evaluation(self.done, found)
        return found is not None

    def _evaluation_due(self) -> bool:
        every = self.config.eval.every_steps
        return bool(every) and 0 < self.done < self.config.train.steps and self.done % every == 0

    def _measure(self, stop: Stop) -> dict[str, float] | None:
        found: dict[str, float] = {}
        for name in self.config.eval.sets:
            index = open_eval(self.config, name)
            metrics = evaluate_retrieval(
                self.engine,
                index,
                self.config,
                self.run,
                self.world,
                self.config.objective.positives,
                stop=lambda: self.world.any(self._asked(stop))[0],
            )
            if metrics is None:
                return None
            found |= {f"eval/{index.name}/{key}": value for key, value in metrics.items()}
            log.info(describe(index.name, metrics))
        best = self.config.checkpoint.best
        if best and best not in found:
            raise GigabatchError(
                f"checkpoint.best: there is no metric {best}; there are {', '.join(found)}."
            )
        return found


def describe(name: str, metrics: dict[str, float]) -> str:
    """One line on a set's retrieval."""
    i2t, t2i = metrics["i2t_recall@10"], metrics["t2i_recall@10"]
    chance = min(1.0, 10 / metrics["candidates"])
    return (
        f"{name}: recall@10 {(i2t + t2i) / 2:.3f} (image to text {i2t:.3f}, text to image "
        f"{t2i:.3f}; {metrics['candidates']:,.0f} candidates, chance {chance:.3f})"
    )
