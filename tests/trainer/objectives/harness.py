"""Steps of a small batch, the same in every process, and comparison with the reference."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.data.order.mixture import SAMPLE_BITS
from gigabatch.trainer.distributed import World
from gigabatch.trainer.objective_state import ObjectiveState
from gigabatch.trainer.objectives import (
    OBJECTIVES,
    Context,
    Objective,
    ObjectiveSettings,
    build_objective,
    parse_settings,
)
from gigabatch.trainer.objectives.base import reference_loss
from gigabatch.trainer.objectives.reference import Example, ReferenceBatch
from gigabatch.trainer.objectives.registry import class_of

SIZES = (13, 7)
"""Samples of the data set's two sources."""
ROWS, WIDTH, TOKENS, SEED = 12, 6, 4, 5
Result = dict[str, Tensor]


def selected() -> dict[str, type[Objective[Any]]]:
    """Return the objectives to test, by name: those in the environment variable OBJECTIVES.

    It holds names separated by spaces. Without it, these are all registered objectives.
    """
    names = os.environ.get("OBJECTIVES", "").split() or list(OBJECTIVES)
    if unknown := [name for name in names if name not in OBJECTIVES]:
        raise ValueError(f"OBJECTIVES: no objective is registered as {', '.join(unknown)}")
    return {name: kind for name, kind in OBJECTIVES.items() if name in names}


@cache
def examples() -> dict[str, tuple[ObjectiveSettings, Example]]:
    """Return the examples of the selected objectives, by `NAME: LABEL`."""
    return {
        f"{name}: {label}": (parse_settings({"name": name, **example.settings}), example)
        for name, kind in selected().items()
        for label, example in kind.examples.items()
    }


@dataclass(frozen=True)
class Batch:
    """A global batch, float32: `outputs` by tap, and the objective's `meta`."""

    outputs: dict[str, Tensor]
    meta: dict[str, Tensor]

    def rows(self, part: slice) -> Batch:
        """Return some samples; a tap may have several rows per sample."""
        per = {name: len(rows) // ROWS for name, rows in self.outputs.items()}
        return Batch(
            {n: r[part.start * per[n] : part.stop * per[n]] for n, r in self.outputs.items()},
            {name: column[part] for name, column in self.meta.items()},
        )


def batch(example: Example, step: int) -> Batch:
    """Make the global batch of a step. Samples may repeat within it and in other steps."""
    g = torch.Generator().manual_seed(100 + step)

    def vectors(*shape: int) -> Tensor:
        return F.normalize(torch.randn(ROWS, *shape, WIDTH, generator=g), dim=-1)

    indices = torch.randint(0, sum(SIZES), (ROWS,), generator=g)
    source = (indices >= SIZES[0]).long()
    meta = {
        "sample": source << SAMPLE_BITS | (indices - SIZES[0] * source),
        "concept": indices % 5,
        "lang": indices % 2,
        "age": (indices % 9) / 4,
        "text_mask": torch.rand(ROWS, TOKENS, generator=g) < 0.6,
    }
    meta["text_mask"][:, 0] = True
    if example.missing:
        meta["image_present"] = indices % 6 != 0
        meta["text_present"] = indices % 7 != 0
    taps = ("image", "text", "image@1", "text@1", "image.encoder", "teacher.image", "teacher.text")
    outputs = {tap: vectors() for tap in taps}
    outputs |= {"image.tokens": vectors(TOKENS + 1), "text.tokens": vectors(TOKENS)}
    meta["teacher: npy"] = torch.randn(ROWS, 3, generator=g)
    if example.captions > 1:
        captions = torch.randn(ROWS * example.captions, WIDTH, generator=g)
        outputs["text"] = F.normalize(captions, dim=1)
    return Batch(outputs, meta)


def shares(world_size: int) -> list[slice]:
    """Return the rows of each rank: unequal; one of four ranks has none."""
    ends = {1: (0, 12), 2: (0, 5, 12), 4: (0, 4, 4, 9, 12)}[world_size]
    return [slice(a, b) for a, b in pairwise(ends)]


def build(settings: ObjectiveSettings, world: World) -> tuple[Objective[Any], ObjectiveState]:
    """Build an objective and its state from a fixed seed."""
    torch.manual_seed(0)
    objective = build_objective(settings, width=WIDTH)
    return objective, ObjectiveState(objective, SIZES, None, world)


def one_step(
    example: Example, objective: Objective[Any], state: ObjectiveState, world: World, step: int
) -> Result:
    """Run a step of this rank, one per epoch; return its value, gradients and final state."""
    local = batch(example, step).rows(shares(world.size)[world.rank])
    ctx = Context(world.group, step, epoch=step - 1, seed=SEED)
    state.begin_epoch(ctx)
    rows = {tap: local.outputs[tap].clone().requires_grad_() for tap in objective.needs.taps}
    teacher = {f"teacher.{tap}": local.outputs[f"teacher.{tap}"] for tap in objective.needs.teacher}
    objective.zero_grad()
    meta = local.meta | state.read(local.meta["sample"])
    loss = objective({**rows, **teacher}, meta, ctx)
    loss.value.backward()
    state.commit(loss.updates(), local.meta["sample"])
    result = {"value": loss.value.detach().clone()}
    for name, leaf in (*rows.items(), *objective.named_parameters()):
        result[f"d {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
    for name, table in state.tables.items():
        result[f"table {name}"] = table.gather()
    result |= {f"buffer {name}": buffer.clone() for name, buffer in objective.named_buffers()}
    return result


def reference_steps(settings: ObjectiveSettings, example: Example) -> list[Result]:
    """Return the value and gradients of each step, by the objective's float64 reference."""
    torch.manual_seed(0)
    objective = build_objective(settings, width=WIDTH)
    memory: dict[Any, Any] = {}
    results = []
    for step in range(1, example.steps + 1):
        inputs = batch(example, step)
        rows = {t: inputs.outputs[t].double().requires_grad_() for t in objective.needs.taps}
        teacher = {t: r.double() for t, r in inputs.outputs.items() if t.startswith("teacher.")}
        parameters = {
            name: p.detach().double().requires_grad_() for name, p in objective.named_parameters()
        }
        value, slope = reference_loss(
            class_of(settings), settings.resolved(),
            ReferenceBatch(rows | teacher, parameters, inputs.meta, memory, step, SEED),
        )  # fmt: skip
        leaves = {**rows, **parameters}
        grads = torch.autograd.grad(
            value if slope is None else slope, list(leaves.values()), allow_unused=True
        )
        result = {"value": value.detach()}
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            result[f"d {name}"] = torch.zeros_like(leaf) if grad is None else grad
        results.append(result)
    return results


def combine(ranks: list[Result], taps: tuple[str, ...]) -> Result:
    """Combine the ranks' results: average values, concatenate rows, take state from rank 0."""
    combined = {}
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        if name.removeprefix("d ") in taps:
            combined[name] = torch.cat(parts) / len(ranks)
        elif name.startswith(("d ", "value")):
            combined[name] = torch.stack(parts).mean(0)
        else:
            combined[name] = parts[0]
    return combined


def assert_equals_reference(ranks: list[list[Result]], label: str) -> None:
    """Compare the steps of all ranks with the reference of one example."""
    settings, example = examples()[label]
    taps = build_objective(settings, width=WIDTH).needs.taps
    for step, expected in enumerate(reference_steps(settings, example)):
        actual = combine([rank[step] for rank in ranks], taps)
        for name, truth in expected.items():
            error = float((actual[name].double() - truth).norm())
            assert error <= 2e-5 * (float(truth.norm()) + 1e-2), (name, step, error, truth)
        assert any(bool(grad.any()) for name, grad in expected.items() if name.startswith("d "))
