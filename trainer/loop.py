"""The training function, the same under Ray, torchrun and in a single process.

It reads everything from the run folder, resumes from the newest valid checkpoint, and writes
checkpoints, metrics and evaluations to the folder.
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
from gigabatch.trainer.evaluation.progress import log_progress, showing
from gigabatch.trainer.init_from import load_init_weights
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
"""Function that returns whether this process should stop early."""


def run_training(run: RunFolder, stop: Stop = lambda: False) -> bool:
    """Train a run to its last step. Every rank must call it.

    Args:
        run: The run's folder.
        stop: Called after every step, and after every micro-batch of an evaluation.

    Returns:
        True if the run is finished; false if it stopped early, with a checkpoint, because `stop`
        returned true or the run folder has a stop request.

    Raises:
        GigabatchError: for errors that the user can fix.
    """
    config = run.config()
    with join_world(config.cluster.threads) as world, log_to(run, world):
        attempt = begin_attempt(run, world)
        with run.fenced(attempt):
            return _Trainer(run, config, world, attempt).train(stop)


class _Trainer:
    """One attempt on one rank."""

    def __init__(self, run: RunFolder, config: Config, world: World, attempt: int) -> None:
        self.run, self.config, self.world, self.attempt = run, config, world, attempt

        # Open the data, the same on every rank.
        self.data = open_train(config)
        agree_on_data(run, world, self.data)

        # Choose the checkpoint on rank 0, so that all ranks resume the same one.
        self.progress = Progress(world.device)
        checkpoint = agree_on_checkpoint(run, world)

        # Build the towers, the objective and the engine.
        self._build(checkpoint)

        # Restore the counters.
        self.counts = Counts()
        if checkpoint:
            self.counts = Counts.from_checkpoint(checkpoint.step, checkpoint.state)
        self.saved_at, self.saved_step = time.monotonic(), self.counts.done
        self.stragglers = Stragglers(world, self.progress)

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """Build towers, objective and engine in the state of a checkpoint, or before step 1."""
        config, world = self.config, self.world
        towers = build_towers(config, load_tokenizer(self.run.tokenizer).get_vocab_size())
        self.objective = build_objective(
            config.objective, world.device, config.data.group, config.towers.width
        )

        # Load the weights before the engine exists: it copies them, and ZeRO 3 shards them.
        if checkpoint:
            towers.load_state_dict(checkpoint.tensors("towers"), strict=True)
        elif config.train.init_from:
            load_init_weights(towers, config, world)

        # Copy the complete weights for the momentum tower and the average, for the same reason.
        state = open_state(self.objective, self.data.sizes, towers.to(world.device), world)
        self.ema = open_ema(towers, config.train.ema, checkpoint)

        # Hand the towers over to DeepSpeed.
        self.engine = Engine(towers, config, world)
        self.step_fn = ExactStep(
            self.engine, self.objective, config, world, self.progress, state, self.ema
        )

        # Load the optimizers' moments and the objective's state.
        if checkpoint:
            steps = checkpoint.state["optimizer_steps"]
            self.engine.load_moments(checkpoint.tensors("moments"), steps)
            self.step_fn.load_objective_state(checkpoint.tensors("objective"), steps)

    def _rewind(self) -> None:
        """Restore the last checkpoint and continue with the next step.

        The result is saved at once, so that a later resume does not depend on which checkpoint it
        finds.
        """
        self.saver.finish_write()  # The write in progress may be the last checkpoint.
        checkpoint = agree_on_checkpoint(self.run, self.world)
        restored = checkpoint.step if checkpoint else 0
        del self.engine, self.step_fn, self.objective, self.ema
        gc.collect()  # Free their memory before building new ones.
        self._build(checkpoint)
        counts = self.counts
        counts.rewinds, counts.bad_steps = counts.rewinds + 1, 0
        log.warning(
            "rewound to the checkpoint of step %d; continuing with step %d (rewind %d of %d)",
            restored, counts.done + 1, counts.rewinds, self.config.train.max_rewinds,
        )  # fmt: skip
        metrics = {"train/rewinds": counts.rewinds, "train/voided_steps": counts.done - restored}
        self.reporter.write(counts.done, metrics)
        self._save()

    def _save(self) -> None:
        self.progress.enter("save")
        self.saver.save(self.counts.done, self._snapshot)
        self.saved_at, self.saved_step = time.monotonic(), self.counts.done

    def _snapshot(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Copy everything that a checkpoint contains: tensors by file, and the JSON state."""
        towers, moments = self.engine.weights(), self.engine.moments()
        objective = self.step_fn.objective_state()
        files: dict[str, Tensors] = {
            "towers": towers, "moments": moments, "objective": objective,
        }  # fmt: skip
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
        self.reporter.flush()  # A resumed run must not miss the metrics before its checkpoint.
        return files, state

    def train(self, stop: Stop) -> bool:
        """Run the training loop; return what `run_training` returns."""
        steps = self.config.train.steps
        self._log_start()
        self.progress.enter("data", self.counts.done + 1)
        with ExitStack() as cleanup:
            # Watch for hangs. The watchdog is closed last, so that it also covers the final writes.
            hang_timeout = self.config.train.hang_timeout_s
            cleanup.enter_context(
                watching(self.run, self.attempt, self.world, self.progress, hang_timeout)
            )

            # Open the metrics.
            attempt = (self.run, self.config, self.world, self.attempt)
            self.reporter = Reporter(*attempt, self.data, self.counts)
            cleanup.callback(self.reporter.close)
            if self.world.is_main:
                self.run.remove_evaluations_after(self.counts.done)

            # Open the saver, which reports its times as metrics.
            saving = (self.run, self.world, self.attempt, self.config.checkpoint)
            self.saver = cleanup.enter_context(Saver(*saving, self.reporter.write))
            if self.counts.done:
                self.saver.copy(self.counts.done)  # An earlier attempt may not have uploaded it.

            # An earlier attempt may have ended before the evaluation of its last step.
            if not self._evaluate(stop, if_due=True):
                return self._stop_early()

            for batch in self._batches():
                self._one_step(batch)
                bad = [sample for micro in batch if micro.real for sample in micro.substitutions]
                stopping, save_due, any_bad = self._decide(stop, bool(bad))
                if any_bad:
                    self.reporter.bad_samples(bad)
                if save_due or self.counts.done == steps:
                    self._save()
                if stopping and self.counts.done < steps:
                    return self._stop_early()
                if not self._evaluate(stop, if_due=True):
                    return self._stop_early()

            # Evaluate the last step and wait for its checkpoint.
            if not self._evaluate(stop):
                return self._stop_early()
            self.saver.finish_write()
            log.info("finished: %d steps", steps)
            self._wait_for_uploads()
        return True

    def _stop_early(self) -> bool:
        """Save the last step and record the stop; return false."""
        if self.saved_step < self.counts.done:
            self._save()
        self.saver.finish_write()
        if self.world.is_main and self.run.owned_by(self.attempt):
            self.run.record_stop()
        steps = self.config.train.steps
        log.info("stopped at step %d of %d, as requested", self.counts.done, steps)
        self._wait_for_uploads()
        return False

    def _wait_for_uploads(self) -> None:
        self.saver.await_copies(self.saved_step, lambda: self.progress.enter("save"))

    def _log_start(self) -> None:
        weights = sum(p.numel() for p in self.engine.named.values())
        batch, world = self.config.batch, self.world
        log.info(
            f"attempt {self.attempt}: {world.size} worker{'s' * (world.size > 1)} on "
            f"{world.device.type} (CPU threads per worker: {torch.get_num_threads()}), "
            f"{weights / 1e6:.1f} M weights, {len(self.data):,} samples, "
            f"batch {batch.global_size:,} in micro-batches of {batch.micro_size:,}"
        )
        if self.counts.done:
            log.info("resuming after step %d", self.counts.done)

    def _batches(self) -> Iterator[list[MicroBatch]]:
        """Yield this rank's micro-batches of each remaining step; measure the wait for data."""
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
        """Take a step and report it; rewind or raise after too many non-finite steps."""
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
        elif step == self.reporter.first:
            self.reporter.log_first(result)
        if self.counts.bad_steps >= config.train.max_bad_steps:
            self._rewind_or_stop()

    def _rewind_or_stop(self) -> None:
        settings, counts = self.config.train, self.counts
        if settings.on_bad_steps == "rewind" and counts.rewinds < settings.max_rewinds:
            return self._rewind()
        self.saver.finish_write()
        after = f" after {counts.rewinds} rewinds" if counts.rewinds else ""
        raise GigabatchError(
            f"{self.run.path}: {counts.bad_steps} consecutive steps had a non-finite loss or "
            f"gradient{after}, up to step {counts.done}. The last checkpoint is of step "
            f"{self.saved_step}. Lower optimizer.lr, or raise schedule.warmup_steps."
        )

    def _decide(self, stop: Stop, bad: bool) -> tuple[bool, bool, bool]:
        """Agree over all ranks, in one collective, on what follows a step.

        Args:
            stop: As in `run_training`.
            bad: Whether this rank's batch had an unreadable sample.

        Returns:
            (stop now, save now, whether any rank had an unreadable sample).
        """
        settings, done, world = self.config.checkpoint, self.counts.done, self.world
        minutes = (time.monotonic() - self.saved_at) / 60
        by_time = settings.every_minutes and minutes >= settings.every_minutes
        by_step = save_is_due(done, settings, evaluation_is_due(done, self.config))
        # Do not save after a non-finite step: retention would remove the last good checkpoints. A
        # save request stays pending until a step is finite.
        requested = self.counts.bad_steps == 0 and world.is_main and self.run.take_save_request()
        save_here = world.is_main and (requested or bool(by_time))
        stopping, saving, any_bad, written = world.any(
            self._stop_requested(stop), save_here, bad, self.saver.write_ended()
        )
        if written:
            self.saver.finish_write()
        return stopping, (saving or by_step) and self.counts.bad_steps == 0, any_bad

    def _stop_requested(self, stop: Stop) -> bool:
        """Return whether this process, or the run folder, requests a stop."""
        # Called after each step and each evaluated micro-batch; tells the watchdog of progress.
        self.progress.enter(self.progress.phase)
        return stop() or (self.world.is_main and self.run.stop_requested())

    def _stop_requested_anywhere(self, stop: Stop) -> bool:
        """Return whether any rank requests a stop. Collective: every rank must call it."""
        return self.world.any(self._stop_requested(stop))[0]

    def _evaluate(self, stop: Stop, if_due: bool = False) -> bool:
        """Evaluate the run's sets; write eval/, metrics.jsonl and TensorBoard events.

        Returns false if a stop was requested meanwhile. Then no result is kept, and the resumed run
        evaluates again.
        """
        config, world, done = self.config, self.world, self.counts.done
        if not config.eval.sets or (if_due and not evaluation_is_due(done, config)):
            return True
        # Rank 0 decides: on a shared file system the other ranks may see an older folder.
        if world.broadcast(self.run.evaluated(done)):
            return True
        self.engine.train(False)
        self.progress.enter("evaluate", done)
        began = time.monotonic()
        stop_requested = partial(self._stop_requested_anywhere, stop)
        embed = self.engine if self.ema is None else self.ema
        show = log_progress(f"evaluating step {done}") if world.is_main else None
        with showing(show):
            metrics = evaluate_sets(embed, config, self.run, world, stop_requested)
        self.engine.train(True)
        # Evaluation does not count as training time.
        self.reporter.clock.since += time.monotonic() - began
        if metrics and world.is_main:
            self.reporter.write(done, metrics)
            self.reporter.flush()
            self.run.write_evaluation(done, metrics)
        return metrics is not None
