"""The exact large-batch step: two passes over micro-batches, one gradient (GradCache's idea, Gao et
al. 2021, with the randomness of each micro-batch replayed).

1. Embed every micro-batch without a graph.
2. The objective over the embeddings of the whole global batch, and its gradient in them.
3. Embed each micro-batch again and push its slice of that gradient through the towers.

Every gradient, the logit scale's included, equals that of one graph over the same micro-batches.
With one micro-batch a rank, and one view of it, the first embedding keeps its graph and there is no
second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.data.augment import augment
from gigabatch.data.rng import key
from gigabatch.data.stream import MicroBatch
from gigabatch.trainer.config import Config, DataSettings
from gigabatch.trainer.distributed import World
from gigabatch.trainer.ema import follow, warmed
from gigabatch.trainer.engine import MOMENTS, Engine, cpu_copy
from gigabatch.trainer.monitoring.progress import Progress
from gigabatch.trainer.objective_state import ObjectiveState
from gigabatch.trainer.objectives import Context, Objective
from gigabatch.trainer.optim import adamw
from gigabatch.trainer.taps import TEACHER, in_view, parse_tap, plain_of, views_of
from gigabatch.trainer.towers import Towers

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """`loss`: of the global batch, the same on every rank. `applied`: false when a loss or a
    gradient was not finite somewhere; then nothing changed anywhere. `metrics`: the objective's."""

    loss: float
    applied: bool
    grad_norm: float
    metrics: Mapping[str, float]


class ExactStep:
    """Takes optimizer steps on (engine, objective). `ema`: towers that follow the engine's."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
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
        self.views = range(views_of(objective.needs.taps))
        self.own = [p for p in objective.parameters() if p.requires_grad]
        peak = config.optimizer.objective_lr or config.optimizer.lr
        self.own_lr_ratio = peak / config.optimizer.lr
        # Scales and biases: never decayed.
        groups: list[dict[str, object]] = [{"params": self.own, "weight_decay": 0.0}]
        self.optimizer = adamw(groups, config.optimizer) if self.own else None

    def __call__(self, step: int, batch: Sequence[MicroBatch], lr: float) -> StepResult:
        """One step on this rank's micro-batches of step number `step`; `lr` is the towers'."""
        batch = [micro.to(self.world.device) for micro in batch]
        ctx = self._context(step)
        self.state.begin_epoch(ctx)
        one_pass = len(batch) == len(self.views) == 1
        with torch.set_grad_enabled(one_pass):
            outputs = [self._views(micro, "embed") for micro in batch]
        rows = self._rows(outputs, batch)
        read = ("image", "text", *batch[0].more)
        meta = _join([micro.tensors for micro in batch], batch, drop=read)
        numbers = meta["sample"]
        meta |= self.state.read(numbers)

        self.progress.enter("loss")
        loss = self.objective(rows | self._teach(batch), meta, ctx)
        loss.value.backward()
        value, finite = self._settle(loss.value, rows)
        metrics = {name: float(metric) for name, metric in loss.metrics.items()}
        if not finite:
            self._clear()
            return StepResult(value, False, float("nan"), metrics)

        taken = 0
        with self.engine.accumulating():
            for micro, first in zip(batch, outputs, strict=True):
                last = taken + (len(micro.keys) if micro.real else 0)
                for view in self.views:
                    again = first if one_pass else self._embed(micro, view, "backward")
                    self.progress.enter("backward")
                    self.engine.backward(_surrogate(again, rows, taken, last))
                taken = last
            self.progress.enter("step")
        applied, norm = self.engine.step(lr)
        if applied:
            self._step_objective(lr)
            self.state.commit(loss.updates(), numbers)
            self._follow()
        self._clear()
        return StepResult(value, applied, norm, metrics)

    def own_state(self) -> dict[str, Tensor]:
        """Copies of the objective's parameters, buffers, moments, tables and momentum tower, for
        a checkpoint; what is sharded is whole on rank 0. A collective."""
        state = {name: cpu_copy(t) for name, t in self.objective.state_dict().items()}
        for name, parameter in self.objective.named_parameters():
            moments = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
            for moment in MOMENTS:
                if moment in moments:
                    state[f"{name}.{moment}"] = cpu_copy(moments[moment])
        return state | self.state.save()

    def load_own_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Put back what `own_state` gave, after `steps` applied steps."""
        self.state.load(state)
        known = self.objective.state_dict()
        self.objective.load_state_dict({name: state[name] for name in known})
        for name, parameter in self.objective.named_parameters():
            if self.optimizer and f"{name}.{MOMENTS[0]}" in state:
                moments = {m: state[f"{name}.{m}"].to(parameter.device) for m in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}

    def _context(self, step: int) -> Context:
        epoch = (step - 1) * self.batch_size // max(1, self.state.samples)
        return Context(self.world.group, step, epoch, self.seed)

    def _stream(self, micro: MicroBatch) -> int:
        return key(self.seed, "micro-batch", micro.step, micro.number)

    def _views(self, micro: MicroBatch, phase: str) -> Outputs:
        found: Outputs = {}
        for view in self.views:
            found |= self._embed(micro, view, phase)
        return found

    def _embed(self, micro: MicroBatch, view: int, phase: str) -> Outputs:
        """The taps of one view. The first calls every tower, which ZeRO's collectives want."""
        self.progress.enter(phase)
        stream, taps = self._stream(micro), plain_of(self.objective.needs.taps, view)
        stream = key(stream, "view", view) if view else stream
        inputs = tower_inputs(micro, self.data, stream)
        if view:
            inputs = {parse_tap(tap).modality: inputs[parse_tap(tap).modality] for tap in taps}
        outputs = self.engine(inputs, stream, taps)
        return {in_view(name, view): vectors for name, vectors in outputs.items()}

    @torch.no_grad()
    def _teach(self, batch: Sequence[MicroBatch]) -> Outputs:
        """What the momentum tower makes of the batch, augmented anew."""
        taps, teacher = self.objective.needs.teacher, self.state.teacher
        if teacher is None:
            return {}
        outputs = []
        for micro in batch:
            self.progress.enter("embed")
            inputs = tower_inputs(micro, self.data, key(self._stream(micro), "teacher"))
            found = teacher(inputs, None, taps)
            outputs.append({TEACHER + tap: found[tap] for tap in taps})
        return _join(outputs, batch)

    def _rows(self, outputs: Sequence[Outputs], batch: Sequence[MicroBatch]) -> Outputs:
        rows = _join(outputs, batch)
        taps = self.objective.needs.taps
        return {tap: rows[tap].detach().requires_grad_() for tap in taps}

    def _settle(self, value: Tensor, rows: Outputs) -> tuple[float, bool]:
        """One collective: average the loss and the objective's gradients over ranks, and learn
        whether everything is finite on every rank."""
        own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.own]
        sound = torch.stack(
            [value.detach(), *(r.grad.sum() for r in rows.values() if r.grad is not None)]
        )
        bad = (~torch.isfinite(sound).all()).to(value.dtype)
        flat = torch.cat([torch.stack([bad, value.detach()]), *(g.flatten() for g in own)])
        flat = self.world.sum(flat) / self.world.size
        for parameter, mean in zip(
            self.own, flat[2:].split([p.numel() for p in self.own]), strict=True
        ):
            parameter.grad = mean.view_as(parameter).clone()
        return float(flat[1]), bool(flat[0] == 0) and bool(torch.isfinite(flat).all())

    def _step_objective(self, lr: float) -> None:
        if self.optimizer is not None:
            self.optimizer.param_groups[0]["lr"] = lr * self.own_lr_ratio
            self.optimizer.step()

    def _follow(self) -> None:
        averages: list[tuple[Towers, float]] = []
        if self.state.teacher is not None:
            averages.append((self.state.teacher, self.objective.needs.momentum))
        if self.ema is not None:
            averages.append((self.ema, warmed(self.momentum, self.engine.steps)))
        follow(self.engine.live_weights(), averages)

    def _clear(self) -> None:
        for parameter in self.own:
            parameter.grad = None


def tower_inputs(
    micro: MicroBatch, data: DataSettings, stream: int | None
) -> dict[str, tuple[Tensor, ...]]:
    """The towers' arguments from a micro-batch, of the modalities that it has: images augmented
    (with a key) and normalised, others with their lengths or masks."""
    inputs: dict[str, tuple[Tensor, ...]] = {}
    if "image" in micro.tensors:
        images = micro.tensors["image"]
        if stream is None:
            pixels = images.float() / 255
        else:
            pixels = augment(images, data.augment, key(stream, "augment"))
        inputs["image"] = ((pixels - data.image.mean) / data.image.std,)
    if "text" in micro.tensors:
        inputs["text"] = (micro.tensors["text"], micro.tensors["text_mask"])
    for name in micro.more:
        beside = (f"{name}_length", f"{name}_mask")
        found = [micro.tensors[key] for key in (name, *beside) if key in micro.tensors]
        inputs[name] = tuple(found)
    return inputs


def _join(
    parts: Sequence[Mapping[str, Tensor]], batch: Sequence[MicroBatch], drop: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Concatenate the rows of real micro-batches; [0, ...] where there is none."""
    names = [name for name in parts[0] if name not in drop]
    rows = [
        p if m.real else {n: p[n][:0] for n in names} for p, m in zip(parts, batch, strict=True)
    ]
    return {name: torch.cat([part[name] for part in rows]) for name in names}


def _surrogate(outputs: Outputs, rows: Outputs, first: int, last: int) -> Tensor:
    """A scalar whose gradient in `outputs`, of samples `first` to `last`, is the objective's; a
    dummy's (no samples) is zero, through every tower all the same. (DeepSpeed's `backward` takes
    scalars only.)"""
    total = torch.zeros((), device=next(iter(outputs.values())).device)
    for tap, output in outputs.items():
        grad = rows[tap].grad if tap in rows else None
        if grad is None or last == first:
            total = total + (output * 0.0).sum()
        else:
            per = len(output) // (last - first)  # captions a sample
            total = total + (output * grad[first * per : last * per]).sum()
    return total
