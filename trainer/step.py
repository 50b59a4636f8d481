"""The exact large-batch step: two passes over micro-batches, one gradient.

The idea is GradCache (Gao et al. 2021), with the randomness of each micro-batch replayed:

1. Embed every micro-batch without a graph.
2. Evaluate the objective on the embeddings of the global batch, and its gradient in them.
3. Embed each micro-batch again and backpropagate its slice of that gradient through the towers.

All gradients, including that of the logit scale, equal those of a single graph over the same
micro-batches. With one micro-batch per rank and one view, the first embedding keeps its graph, and
there is no second pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gigabatch.data.augment import augment
from gigabatch.data.decode.images import normalize
from gigabatch.data.rng import key
from gigabatch.data.stream import MicroBatch
from gigabatch.trainer.config import Config, DataSettings
from gigabatch.trainer.distributed import World
from gigabatch.trainer.ema import update_averages, warmup_momentum
from gigabatch.trainer.engine import MOMENTS, Engine, cpu_copy
from gigabatch.trainer.monitoring.progress import Progress
from gigabatch.trainer.monitoring.step_result import StepResult
from gigabatch.trainer.objective_state import ObjectiveState
from gigabatch.trainer.objectives import Context, Objective
from gigabatch.trainer.optim import adamw
from gigabatch.trainer.taps import TEACHER, bases_in_view, count_views, parse_tap, with_view
from gigabatch.trainer.towers import Towers

Outputs = dict[str, Tensor]
"""Tap name -> vectors [n, D], or token vectors [n, T, D]."""


class ExactStep:
    """Takes optimizer steps on the towers of an engine and on an objective.

    Args:
        engine: The towers under DeepSpeed.
        objective: The loss over the global batch.
        config: The run.
        world: This process and its group.
        progress: Records the current phase.
        state: Tables and momentum tower of the objective; None creates tables without samples.
        ema: Copy of the towers that averages the engine's weights over steps (`train.ema`).
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective[Any],
        config: Config,
        world: World,
        progress: Progress | None = None,
        state: ObjectiveState | None = None,
        ema: Towers | None = None,
    ) -> None:
        self.engine, self.objective, self.world = engine, objective, world
        self.progress = progress or Progress(world.device)
        self.data, self.seed = config.data, config.run.seed
        self.state = state or ObjectiveState(objective, [], None, world)
        self.ema, self.momentum = ema, config.train.ema
        self.batch_size = config.batch.global_size
        self.views = range(count_views(objective.needs.taps))
        self.objective_params = [p for p in objective.parameters() if p.requires_grad]
        objective_lr = config.optimizer.objective_lr or config.optimizer.lr
        self.objective_lr_ratio = objective_lr / config.optimizer.lr
        # Scales and biases are never decayed.
        groups: list[dict[str, object]] = [{"params": self.objective_params, "weight_decay": 0.0}]
        self.optimizer = adamw(groups, config.optimizer) if self.objective_params else None

    def __call__(self, step: int, batch: Sequence[MicroBatch], lr: float) -> StepResult:
        """Take one optimizer step. Collective: every rank must call it.

        Args:
            step: Number of the step, from 1.
            batch: This rank's micro-batches of the step.
            lr: Learning rate of the towers.
        """
        batch = [micro.to(self.world.device) for micro in batch]
        ctx = self._context(step)
        self.state.begin_epoch(ctx)
        one_pass = len(batch) == len(self.views) == 1
        with torch.set_grad_enabled(one_pass):
            outputs = [self._embed_views(micro, "embed") for micro in batch]
        rows = self._objective_inputs(outputs, batch)
        tower_tensors = ("image", "text", *batch[0].more)
        meta = _concat_real([micro.tensors for micro in batch], batch, drop=tower_tensors)
        samples = meta["sample"]
        meta |= self.state.read(samples)

        self.progress.enter("loss")
        loss = self.objective(rows | self._embed_with_teacher(batch), meta, ctx)
        loss.value.backward()
        value, finite = self._reduce_loss_and_gradients(loss.value, rows)
        metrics = {name: float(metric) for name, metric in loss.metrics.items()}
        if not finite:
            self._clear_objective_gradients()
            return StepResult(value, False, float("nan"), metrics)

        first_row = 0
        with self.engine.accumulating():
            for micro, embedded in zip(batch, outputs, strict=True):
                end_row = first_row + (len(micro.keys) if micro.real else 0)
                for view in self.views:
                    graph = embedded if one_pass else self._embed(micro, view, "backward")
                    self.progress.enter("backward")
                    self.engine.backward(_surrogate_loss(graph, rows, first_row, end_row))
                first_row = end_row
            self.progress.enter("step")
        applied, norm = self.engine.step(lr)
        if applied:
            self._step_objective(lr)
            self.state.commit(loss.updates(), samples)
            self._update_averages()
        self._clear_objective_gradients()
        return StepResult(value, applied, norm, metrics)

    def objective_state(self) -> dict[str, Tensor]:
        """Copy the objective's state to host memory, for a checkpoint.

        Collective: every rank must call it. The state has the parameters, buffers, moments, tables
        and momentum tower; sharded tables are complete on rank 0.
        """
        state = {name: cpu_copy(t) for name, t in self.objective.state_dict().items()}
        for name, parameter in self.objective.named_parameters():
            moments = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
            for moment in MOMENTS:
                if moment in moments:
                    state[f"{name}.{moment}"] = cpu_copy(moments[moment])
        return state | self.state.save()

    def load_objective_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Restore the result of `objective_state` after `steps` applied steps."""
        self.state.load(state)
        names = self.objective.state_dict()
        self.objective.load_state_dict({name: state[name] for name in names})
        for name, parameter in self.objective.named_parameters():
            if self.optimizer and f"{name}.{MOMENTS[0]}" in state:
                moments = {m: state[f"{name}.{m}"].to(parameter.device) for m in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}

    def _context(self, step: int) -> Context:
        epoch = (step - 1) * self.batch_size // max(1, self.state.samples)
        return Context(self.world.group, step, epoch, self.seed)

    def _rng_key(self, micro: MicroBatch) -> int:
        return key(self.seed, "micro-batch", micro.step, micro.number)

    def _embed_views(self, micro: MicroBatch, phase: str) -> Outputs:
        outputs: Outputs = {}
        for view in self.views:
            outputs |= self._embed(micro, view, phase)
        return outputs

    def _embed(self, micro: MicroBatch, view: int, phase: str) -> Outputs:
        """Embed one view of a micro-batch.

        View 0 runs every tower, even without a tap in that view, so that all ranks issue the same
        ZeRO collectives.
        """
        self.progress.enter(phase)
        rng_key, taps = self._rng_key(micro), bases_in_view(self.objective.needs.taps, view)
        rng_key = key(rng_key, "view", view) if view else rng_key
        inputs = tower_inputs(micro, self.data, rng_key)
        if view:
            inputs = {parse_tap(tap).modality: inputs[parse_tap(tap).modality] for tap in taps}
        outputs = self.engine(inputs, rng_key, taps)
        return {with_view(name, view): vectors for name, vectors in outputs.items()}

    @torch.no_grad()
    def _embed_with_teacher(self, batch: Sequence[MicroBatch]) -> Outputs:
        """Embed the batch with the momentum tower, freshly augmented."""
        taps, teacher = self.objective.needs.teacher, self.state.teacher
        if teacher is None:
            return {}
        outputs = []
        for micro in batch:
            self.progress.enter("embed")
            inputs = tower_inputs(micro, self.data, key(self._rng_key(micro), "teacher"))
            vectors = teacher(inputs, None, taps)
            outputs.append({TEACHER + tap: vectors[tap] for tap in taps})
        return _concat_real(outputs, batch)

    def _objective_inputs(self, outputs: Sequence[Outputs], batch: Sequence[MicroBatch]) -> Outputs:
        """Concatenate the taps that the objective reads, as leaf tensors that get its gradient."""
        rows = _concat_real(outputs, batch)
        taps = self.objective.needs.taps
        return {tap: rows[tap].detach().requires_grad_() for tap in taps}

    def _reduce_loss_and_gradients(self, value: Tensor, rows: Outputs) -> tuple[float, bool]:
        """Average the loss and the objective's gradients over ranks, in one collective.

        Returns the loss, and whether it and all gradients are finite on every rank.
        """
        params = self.objective_params
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        checked = torch.stack(
            [value.detach(), *(r.grad.sum() for r in rows.values() if r.grad is not None)]
        )
        bad = (~torch.isfinite(checked).all()).to(value.dtype)
        header = torch.stack([bad, value.detach()])
        flat = torch.cat([header, *(gradient.flatten() for gradient in gradients)])
        flat = self.world.sum(flat) / self.world.size
        means = torch.split(flat[2:], [p.numel() for p in params])
        for parameter, mean in zip(params, means, strict=True):
            parameter.grad = mean.view_as(parameter).clone()
        return float(flat[1]), bool(flat[0] == 0) and bool(torch.isfinite(flat).all())

    def _step_objective(self, lr: float) -> None:
        if self.optimizer is not None:
            self.optimizer.param_groups[0]["lr"] = lr * self.objective_lr_ratio
            self.optimizer.step()

    def _update_averages(self) -> None:
        """Move the momentum tower and the averaged weights towards the current weights."""
        averages: list[tuple[Towers, float]] = []
        if self.state.teacher is not None:
            averages.append((self.state.teacher, self.objective.needs.momentum))
        if self.ema is not None:
            averages.append((self.ema, warmup_momentum(self.momentum, self.engine.steps)))
        update_averages(self.engine.live_weights(), averages)

    def _clear_objective_gradients(self) -> None:
        for parameter in self.objective_params:
            parameter.grad = None


def tower_inputs(
    micro: MicroBatch, data: DataSettings, rng_key: int | None
) -> dict[str, tuple[Tensor, ...]]:
    """Return the encoder arguments of each modality in a micro-batch.

    Args:
        micro: Decoded samples.
        data: Augmentation and normalization of images.
        rng_key: Seed of the augmentation; None skips it.

    Returns:
        Modality -> arguments: images float32 [B, C, S, S], normalized; texts with their mask;
        others with their lengths or mask, if they have one.
    """
    inputs: dict[str, tuple[Tensor, ...]] = {}
    if "image" in micro.tensors:
        images = micro.tensors["image"]
        if rng_key is None:
            pixels = images.float() / 255
        else:
            pixels = augment(images, data.augment, key(rng_key, "augment"))
        inputs["image"] = (normalize(pixels, data.image),)
    if "text" in micro.tensors:
        inputs["text"] = (micro.tensors["text"], micro.tensors["text_mask"])
    for name in micro.more:
        names = (name, f"{name}_length", f"{name}_mask")
        inputs[name] = tuple(micro.tensors[n] for n in names if n in micro.tensors)
    return inputs


def _concat_real(
    parts: Sequence[Mapping[str, Tensor]], batch: Sequence[MicroBatch], drop: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Concatenate the rows of real micro-batches; [0, ...] if there is none."""
    names = [name for name in parts[0] if name not in drop]
    rows = [
        part if micro.real else {name: part[name][:0] for name in names}
        for part, micro in zip(parts, batch, strict=True)
    ]
    return {name: torch.cat([part[name] for part in rows]) for name in names}


def _surrogate_loss(outputs: Outputs, rows: Outputs, first: int, end: int) -> Tensor:
    """Return a scalar whose gradient in `outputs`, of samples [first, end), is the objective's.

    A padding micro-batch (no samples) gets a gradient of zero, but still runs backward through
    every tower. DeepSpeed's `backward` accepts scalars only.
    """
    total = torch.zeros((), device=next(iter(outputs.values())).device)
    for tap, output in outputs.items():
        grad = rows[tap].grad if tap in rows else None
        if grad is None or end == first:
            total = total + (output * 0.0).sum()
        else:
            per_sample = len(output) // (end - first)  # rows per sample, such as its captions
            total = total + (output * grad[first * per_sample : end * per_sample]).sum()
    return total
