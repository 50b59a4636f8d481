"""Steps with a non-finite loss or gradient on one rank, at each ZeRO stage, on torchrun ranks.

Such a step must change no weight, moment, parameter or buffer of the objective on any rank, and the
next step must be finite. Prints JSON on rank 0: stage -> report of each rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import support_towers
import torch
from step_probe import batch
from torch import Tensor

from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.distributed import World, exit_now, join_world
from gigabatch.trainer.engine import Engine
from gigabatch.trainer.monitoring.step_result import StepResult
from gigabatch.trainer.objectives import Context, Loss
from gigabatch.trainer.objectives.infonce import InfoNCE
from gigabatch.trainer.step import ExactStep
from gigabatch.trainer.towers import build_towers

TOWER = "towers.image={kind: module, module: 'support_towers:BrokenBackward'}"
State = dict[str, dict[str, Tensor]]


class StatefulInfoNCE(InfoNCE):
    """InfoNCE with buffers that change in every applied step: the newest rows and their count."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.objective)
        self.register_buffer("queue", torch.zeros(24, config.towers.width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        rows = outputs["image"].detach()
        queue = torch.cat([rows, self.queue])[: len(self.queue)]
        updates = {"queue": queue, "seen": self.seen + len(rows)}
        return replace(super().forward(outputs, meta, ctx), updates=lambda: updates)


def state(step: ExactStep) -> State:
    """Return copies of all tensors that a step may change on this rank, by kind.

    `engine.weights` and `engine.moments` are complete on rank 0 only, so the tensors that each rank
    holds are added.
    """
    engine, objective = step.engine, step.objective
    live = {n: getattr(p, "ds_tensor", p) for n, p in engine.ds.module.named_parameters()}
    stepped = list(engine.adamw.state.items())
    tensors: State = {
        "weights": engine.weights() | live | {f"{i}": p for i, (p, _) in enumerate(stepped)},
        "moments": engine.moments()
        | {f"{i}.{name}": t for i, (_, state) in enumerate(stepped) for name, t in state.items()},
        "objective": dict(objective.named_parameters()),
        "objective moments": {
            name: t for state in step.optimizer.state.values() for name, t in state.items()
        },
        "objective buffers": dict(objective.named_buffers()),
    }
    return {
        kind: {name: t.detach().clone() for name, t in group.items()}
        for kind, group in tensors.items()
    }


def changed(before: State, after: State) -> list[str]:
    """Return the kinds in which any tensor changed."""
    return [kind for kind in before if not _same(before[kind], after[kind])]


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main(config_path: Path, tokenizer: Path) -> None:
    with join_world(1) as world:
        report = {
            zero: world.gather(one_stage(config_path, tokenizer, world, zero))
            for zero in (0, 1, 2, 3)
        }
        if world.is_main:
            print(json.dumps(report))


def one_stage(path: Path, tokenizer: Path, world: World, zero: int) -> dict[str, Any]:
    config = load_config(path, [f"train.zero_stage={zero}", TOWER])
    engine = Engine(build_towers(config, 1000), config, world)
    step = ExactStep(engine, StatefulInfoNCE(config), config, world)
    rows = batch(config, tokenizer, world.size, world.rank)
    last = world.rank == world.size - 1

    def take(broken_backward: bool, broken_loss: bool) -> StepResult:
        support_towers._NanGradient.broken = broken_backward and last
        mean = float("nan") if broken_loss and last else config.data.image.mean
        image = config.data.image.model_copy(update={"mean": mean})
        step.data = config.data.model_copy(update={"image": image})
        return step(1, rows, 1e-3)

    results, states = [take(False, False)], [state(step)]
    for broken in ((True, False), (False, True), (False, False)):
        results.append(take(*broken))
        states.append(state(step))
    return {
        "applied": [result.applied for result in results],
        "changed": [changed(states[i], states[i + 1]) for i in range(3)],
        "finite": all(
            bool(torch.isfinite(t).all()) for group in states[-1].values() for t in group.values()
        ),
        "steps": engine.steps,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    exit_now(0)
