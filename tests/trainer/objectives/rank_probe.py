"""One rank of a gloo group, which runs every example of every objective on its rows.

python rank_probe.py STORE OUT RANK WORLD_SIZE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import Example, ObjectiveSettings, build, examples, one_step
from torch import Tensor

from gigabatch.trainer.distributed import World, exit_now


def run(settings: ObjectiveSettings, example: Example, world: World) -> dict[str, Any]:
    """Run the steps of an example, then repeat the last one from a checkpoint."""
    objective, state = build(settings, world)
    results = []
    for step in range(1, example.steps + 1):
        if step == example.steps:
            parameters = {name: t.clone() for name, t in objective.state_dict().items()}
            saved = world.broadcast(state.save())
        results.append(one_step(example, objective, state, world, step))
    resumed_objective, resumed_state = build(settings, world)
    resumed_objective.load_state_dict(parameters)
    resumed_state.load(saved)
    resumed = one_step(example, resumed_objective, resumed_state, world, example.steps)
    same = all(equal(resumed[name], value) for name, value in results[-1].items())
    return {"steps": results, "resumed_equal": same}


def equal(a: Tensor, b: Tensor) -> bool:
    """Compare bit for bit; a table holds NaN for unseen samples."""
    return torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))


def main(store: str, out: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
    )
    group = dist.group.WORLD if world_size > 1 else None
    world = World(rank, world_size, torch.device("cpu"), group)
    results = {label: run(*case, world) for label, case in examples().items()}
    torch.save(results, out / f"{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    exit_now(0)
