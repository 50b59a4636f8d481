"""One rank of a gloo group: every case of `cases`, this rank's rows; results saved in OUT.

python objective_ranks.py STORE OUT RANK WORLD_SIZE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES, SIZES, WIDTH, Case, batch, settings_of, shares
from torch import Tensor

from gigabatch.trainer.distributed import World, leave
from gigabatch.trainer.objective_state import ObjectiveState
from gigabatch.trainer.objectives import Context, Objective, build_objective

Result = dict[str, Tensor]


def fresh(case: Case, world: World) -> tuple[Objective, ObjectiveState]:
    torch.manual_seed(0)
    objective = build_objective(settings_of(case), width=WIDTH)
    return objective, ObjectiveState(objective, SIZES, None, world)


def one_step(
    case: Case, objective: Objective, state: ObjectiveState, world: World, step: int
) -> Result:
    """Value, gradients, and what is kept afterwards. Each step is an epoch of its own."""
    mine = batch(case, step).rows(shares(world.size)[world.rank])
    ctx = Context(world.group, step, epoch=step - 1, seed=5)
    state.begin_epoch(ctx)
    taps = objective.needs.taps
    rows = {tap: mine.outputs[tap].clone().requires_grad_() for tap in taps}
    teacher = {f"teacher.{tap}": mine.outputs[f"teacher.{tap}"] for tap in objective.needs.teacher}
    objective.zero_grad()
    meta = mine.meta | state.read(mine.meta["sample"])
    loss = objective({**rows, **teacher}, meta, ctx)
    loss.value.backward()
    state.commit(loss.updates(), mine.meta["sample"])
    found = {"value": loss.value.detach().clone()}
    found |= {
        f"d {tap}": torch.zeros_like(r) if r.grad is None else r.grad for tap, r in rows.items()
    }
    for name, parameter in objective.named_parameters():
        grad = parameter.grad
        found[f"d {name}"] = torch.zeros_like(parameter) if grad is None else grad.clone()
    for name, table in state.tables.items():
        found[f"table {name}"] = table.whole()
    found |= {f"buffer {name}": buffer.clone() for name, buffer in objective.named_buffers()}
    return found


def run(case: Case, world: World) -> dict[str, Any]:
    objective, state = fresh(case, world)
    results = []
    for step in range(1, case.steps + 1):
        if step == case.steps:  # as it would go on from a checkpoint
            own = {name: t.clone() for name, t in objective.state_dict().items()}
            saved = world.share(state.save())
        results.append(one_step(case, objective, state, world, step))
    again, loaded = fresh(case, world)
    again.load_state_dict(own)
    loaded.load(saved)
    resumed = one_step(case, again, loaded, world, case.steps)
    same = all(equal(resumed[name], value) for name, value in results[-1].items())
    return {"steps": results, "same": same}


def equal(one: Tensor, other: Tensor) -> bool:
    """To the bit; NaN is what a table holds of a sample that has not come."""
    return torch.equal(one.nan_to_num(nan=-7.0), other.nan_to_num(nan=-7.0))


def main(store: str, out: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
    )
    group = dist.group.WORLD if world_size > 1 else None
    world = World(rank, world_size, torch.device("cpu"), group)
    torch.save({name: run(case, world) for name, case in CASES.items()}, out / f"{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    leave(0)
