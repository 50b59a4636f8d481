"""On torchrun ranks, each ZeRO stage: a step whose loss, or whose gradient on one rank, is not
finite, changes nothing anywhere; the next step is sound. Prints JSON on rank 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import support_towers
import torch
from step_probe import batch

from gigabatch.trainer.configfile import load_config
from gigabatch.trainer.distributed import World, join_world, leave
from gigabatch.trainer.engine import Engine
from gigabatch.trainer.objectives import build_objective
from gigabatch.trainer.step import ExactStep
from gigabatch.trainer.towers import build_towers

TOWER = "towers.image={kind: module, module: 'support_towers:BrokenBackward'}"


def state(step: ExactStep) -> dict[str, torch.Tensor]:
    engine = step.engine
    own = {name: tensor.clone() for name, tensor in step.own_state().items()}
    return engine.weights() | engine.moments() | own


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main(config_path: Path, tokenizer: Path) -> None:
    report: dict[str, Any] = {}
    with join_world(1) as world:
        for zero in (0, 1, 2, 3):
            report[str(zero)] = one_stage(config_path, tokenizer, world, zero)
        if world.is_main:
            print(json.dumps(report))


def one_stage(path: Path, tokenizer: Path, world: World, zero: int) -> dict[str, Any]:
    config = load_config(path, [f"train.zero={zero}", TOWER])
    objective = build_objective(config.objective)
    engine = Engine(build_towers(config, 1000), config, world)
    step = ExactStep(engine, objective, config, world)
    rows = batch(config, tokenizer, world.size, world.rank)
    last = world.rank == world.size - 1

    def take(broken_backward: bool, broken_loss: bool) -> Any:
        support_towers._NanGradient.broken = broken_backward and last
        images = rows[0].tensors["image"]
        mean = config.data.image.mean
        step.data = config.data.model_copy(
            update={
                "image": config.data.image.model_copy(
                    update={"mean": float("nan") if broken_loss and last else mean}
                )
            }
        )
        assert images.dtype == torch.uint8
        return step(1, rows, 1e-3)

    first = take(False, False)
    settled = state(step)
    backward = take(True, False)
    after_backward = state(step)
    loss = take(False, True)
    after_loss = state(step)
    again = take(False, False)
    return {
        "applied": [r.applied for r in (first, backward, loss, again)],
        "untouched": [same(settled, after_backward), same(settled, after_loss)],
        "moved": not same(settled, state(step)),
        "finite": all(bool(torch.isfinite(t).all()) for t in state(step).values()),
        "steps": engine.steps,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
