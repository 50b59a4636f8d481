"""The training function: the same under Ray, torchrun, and in one process.

It reads everything from the run folder, goes on from the newest sound checkpoint, and leaves
checkpoints, metrics and evaluations there.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.data.stream import MicroBatch, group_by_step
from gigabatch.data.text.tokenizer import load_tokenizer
from gigabatch.trainer.agreement import agree_on_checkpoint, agree_on_data
from gigabatch.trainer.checkpoints.format import Checkpoint, Tensors
from gigabatch.trainer.checkpoints.retention import save_is_due
from gigabatch.trainer.checkpoints.saver import Saver
from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World, join_world
from gigabatch.trainer.ema import EMA, open_ema
from gigabatch.trainer.engine import Engine, cpu_copy
from gigabatch.trainer.evaluation.in_training import evaluate_sets, evaluation_is_due
from gigabatch.trainer.init_from import load_initial
from gigabatch.trainer.inputs import open_train, plans_of, train_stream
from gigabatch.trainer.monitoring.counters import Counts
from gigabatch.trainer.monitoring.progress import Progress
from gigabatch.trainer.monitoring.reporter import Reporter
from gigabatch.trainer.monitoring.stragglers import Stragglers
from gigabatch.trainer.monitoring.watchdog import watching
from gigabatch.trainer.objective_state import open_state
from gigabatch.trainer.objectives import build_objective
from gigabatch.trainer.optim import lr_factor
from gigabatch.trainer.run.attempts import begin_attempt
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.run.log import log_to
from gigabatch.trainer.step import ExactStep
from gigabatch.trainer.towers import build_towers

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


class _Trainer:
    """One attempt on one rank. Sets up in order; the stages of `train` read top to bottom."""

    def __init__(self, run: RunFolder, config: Config, world: World, attempt: int) -> None:
        self.run, self.config, self.world, self.attempt = run, config, world, attempt
        self.data = open_train(config)
        agree_on_data(run, world, self.data)
        self.progress = Progress(world.device)
        checkpoint = agree_on_checkpoint(run, world)
        self._build(checkpoint)
        self.counts = Counts.of(checkpoint.step, checkpoint.state) if checkpoint else Counts()
        self.saved_at, self.saved_step = time.monotonic(), self.counts.done
        self.stragglers = Stragglers(world, self.progress)

    # --- state -------------------------------------------------------------------------------

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """Towers, objective and engine as they stand in a checkpoint, or at the start."""
        config, world = self.config, self.world
        towers = build_towers(config, load_tokenizer(self.run.tokenizer).get_vocab_size())
        self.objective = build_objective(
            config.objective, world.device, config.data.group, config.towers.width
        )
        if checkpoint:
            towers.load_state_dict(checkpoint.tensors("towers"), strict=True)
        elif config.train.init_from:
            load_initial(towers, config, world)
        state = open_state(self.objective, self.data.sizes, towers.to(world.device), world)
        self.ema = open_ema(towers, config.train.ema, checkpoint)
        self.engine = Engine(towers, config, world)
        self.step_fn = ExactStep(
            self.engine, self.objective, config, world, self.progress, state, self.ema
        )
        if checkpoint:
            steps = checkpoint.state["optimizer_steps"]
            self.engine.load_moments(checkpoint.tensors("moments"), steps)
            self.step_fn.load_own_state(checkpoint.tensors("objective"), steps)

    def _rewind(self) -> None:
        """Back to the last checkpoint, but on with the next step. The outcome is saved at once: a
        resume must not depend on which checkpoint it finds."""
        self.saver.settle()  # the checkpoint in flight may be the one
        checkpoint = agree_on_checkpoint(self.run, self.world)
        back = checkpoint.step if checkpoint else 0
        del self.engine, self.step_fn, self.objective, self.ema
        gc.collect()  # room for the new ones
        self._build(checkpoint)
        counts = self.counts
        counts.rewinds, counts.bad_steps = counts.rewinds + 1, 0
        log.warning(
            "rewound to the checkpoint of step %d; on with step %d (rewind %d of at most %d)",
            back, counts.done + 1, counts.rewinds, self.config.train.max_rewinds,
        )  # fmt: skip
        told = {"train/rewinds": counts.rewinds, "train/voided_steps": counts.done - back}
        self.reporter.write(counts.done, told)
        self._save()

    def _save(self) -> None:
        self.progress.enter("save")
        self.saver.save(self.counts.done, self._snapshot)
        self.saved_at, self.saved_step = time.monotonic(), self.counts.done

    def _snapshot(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Tensors by file, and the rest, as they are now: the next steps do not touch them."""
        towers, moments = self.engine.weights(), self.engine.moments()
        own = self.step_fn.own_state()
        files: dict[str, Tensors] = {"towers": towers, "moments": moments, "objective": own}
        if self.ema is not None and self.world.is_main:
            files[EMA] = {name: cpu_copy(t) for name, t in self.ema.state_dict().items()}
        state: dict[str, Any] = {
            "step": self.counts.done,
            "samples_seen": self.counts.done * self.config.batch.global_size,
            "optimizer_steps": self.engine.steps,
            **self.counts.state(),
            "data": self.data.digest,
            "attempt": self.attempt,
        }
        self.reporter.flush()
        return files, state

    # --- the run -----------------------------------------------------------------------------

    def train(self, stop: Stop) -> bool:
        steps = self.config.train.steps
        self._announce()
        hang_after = self.config.train.hang_timeout_s
        self.progress.enter("data", self.counts.done + 1)
        with ExitStack() as cleanup:
            cleanup.enter_context(
                watching(self.run, self.attempt, self.world, self.progress, hang_after)
            )
            attempt = (self.run, self.config, self.world, self.attempt)
            self.reporter = Reporter(*attempt, self.data, self.counts)
            cleanup.callback(self.reporter.close)
            if self.world.is_main:
                self.run.forget_evaluations_after(self.counts.done)
            saving = (self.run, self.world, self.attempt, self.config.checkpoint)
            self.saver = cleanup.enter_context(Saver(*saving, self.reporter.write))
            if self.counts.done:
                self.saver.copy(self.counts.done)  # where an earlier attempt left it uncopied
            if not self._evaluate(stop, if_due=True):  # a stop or a kill may have come before it
                return self._stopped()
            for batch in self._batches():
                self._one_step(batch)
                bad = [each for micro in batch if micro.real for each in micro.substitutions]
                stopping, save_due, some_bad = self._decide(stop, bool(bad))
                if some_bad:
                    self.reporter.bad_samples(bad)
                if save_due or self.counts.done == steps:
                    self._save()
                if stopping and self.counts.done < steps:
                    return self._stopped()
                if not self._evaluate(stop, if_due=True):
                    return self._stopped()
            if not self._evaluate(stop):
                return self._stopped()
            self.saver.settle()
            log.info("finished: %d steps", steps)
            self._await_copies()
        return True

    def _stopped(self) -> bool:
        """Leave as asked; false."""
        if self.saved_step < self.counts.done:
            self._save()
        self.saver.settle()
        if self.world.is_main and self.run.owned_by(self.attempt):
            self.run.record_stop()
        steps = self.config.train.steps
        log.info("stopped at step %d of %d, as asked", self.counts.done, steps)
        self._await_copies()
        return False

    def _await_copies(self) -> None:
        self.saver.await_copies(self.saved_step, lambda: self.progress.enter("save"))

    def _announce(self) -> None:
        weights = sum(p.numel() for p in self.engine.named.values())
        batch, world = self.config.batch, self.world
        log.info(
            f"attempt {self.attempt}: {world.size} worker{'s' * (world.size > 1)} on "
            f"{world.device.type} (threads each: {torch.get_num_threads()}), "
            f"{weights / 1e6:.1f} M weights, {len(self.data):,} samples, "
            f"batch {batch.global_size:,} in micro-batches of {batch.micro_size:,}"
        )
        if self.counts.done:
            log.info("going on after step %d", self.counts.done)

    def _batches(self) -> Iterator[list[MicroBatch]]:
        world, clock = self.world, self.reporter.clock
        last = self.config.train.steps
        plans = plans_of(self.data, world.size, world.rank, self.counts.done + 1, last)
        needs, on_gpu = self.objective.needs, world.device.type == "cuda"
        tokenizer = self.run.tokenizer
        stream = train_stream(
            self.data, plans, tokenizer, needs.columns, on_gpu, needs.numeric_columns, needs.vectors
        )
        batches = group_by_step(stream, plans.per_step)
        while True:
            began = time.monotonic()
            self.progress.enter("data", self.counts.done + 1)
            batch = next(batches, None)
            clock.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def _one_step(self, batch: list[MicroBatch]) -> None:
        config, step = self.config, self.counts.done + 1
        lr = config.optimizer.lr * lr_factor(step, config.train.steps, config.schedule)
        result = self.step_fn(step, batch, lr)
        self.reporter.clock.steps += 1
        self.counts.step(step, result.applied)
        if config.monitor.record_samples:
            self.reporter.samples(batch)
        if step % config.monitor.every_steps == 0 or step == config.train.steps:
            more = {**self.saver.metrics(), **self.stragglers.metrics(step)}
            self.reporter.step(result, lr, more)
        if self.counts.bad_steps >= config.train.max_bad_steps:
            self._rewind_or_stop()

    def _rewind_or_stop(self) -> None:
        settings, counts = self.config.train, self.counts
        if settings.on_bad_steps == "rewind" and counts.rewinds < settings.max_rewinds:
            return self._rewind()
        self.saver.settle()
        after = f", after {counts.rewinds} rewinds" if counts.rewinds else ""
        raise GigabatchError(
            f"{self.run.path}: {counts.bad_steps} steps in a row had a loss or gradient that is "
            f"not finite{after} (the last: step {counts.done}; the last checkpoint: step "
            f"{self.saved_step}). Lower optimizer.lr, or lengthen schedule.warmup_steps."
        )

    def _decide(self, stop: Stop, bad: bool) -> tuple[bool, bool, bool]:
        """Agreed by all ranks: stop now? save now? was any sample bad?"""
        settings, done, world = self.config.checkpoint, self.counts.done, self.world
        minutes = (time.monotonic() - self.saved_at) / 60
        by_time = settings.every_minutes and minutes >= settings.every_minutes
        group_by_step = save_is_due(done, settings, evaluation_is_due(done, self.config))
        # A request stands until a streak of bad steps, which saves nothing, is over.
        asked = self.counts.bad_steps == 0 and world.is_main and self.run.take_save_request()
        timed_here = world.is_main and (asked or bool(by_time))
        stopping, timed, some_bad, written = world.any(
            self._asked(stop), timed_here, bad, self.saver.over()
        )
        if written:
            self.saver.settle()
        # A streak of bad steps must not push the checkpoints before it out.
        return stopping, (timed or group_by_step) and self.counts.bad_steps == 0, some_bad

    def _asked(self, stop: Stop) -> bool:
        self.progress.enter(self.progress.phase)  # asked once a step, or a micro-batch measured
        return stop() or (self.world.is_main and self.run.stop_requested())

    def _any_asked(self, stop: Stop) -> bool:
        """On any rank. A collective."""
        return self.world.any(self._asked(stop))[0]

    def _evaluate(self, stop: Stop, if_due: bool = False) -> bool:
        """Measure the run's sets; into eval/, metrics.jsonl and TensorBoard. False where a stop
        was asked for in the middle: then nothing of it is kept, and a resume measures again."""
        config, world, done = self.config, self.world, self.counts.done
        if not config.eval.sets or (if_due and not evaluation_is_due(done, config)):
            return True
        # Rank 0's word: on a shared file system the others may see an older folder.
        if world.share(self.run.evaluated(done)):
            return True
        self.engine.train(False)
        self.progress.enter("evaluate", done)
        began = time.monotonic()
        asked = partial(self._any_asked, stop)
        embed = self.engine if self.ema is None else self.ema
        found = evaluate_sets(embed, config, self.run, world, asked)
        self.engine.train(True)
        self.reporter.clock.since += time.monotonic() - began
        if found and world.is_main:
            self.reporter.write(done, found)
            self.reporter.flush()
            self.run.write_evaluation(done, found)
        return found is not None
