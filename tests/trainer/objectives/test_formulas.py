"""Every objective on 1, 2 and 4 gloo ranks, over a few steps with what it keeps between them,
equals its formula in float64: the value and all gradients. One group of processes a world size
runs all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import formulas
import pytest
import torch
from cases import CASES, Case, batch, settings_of
from objective_ranks import run
from torch import Tensor

from gigabatch.trainer.distributed import World
from gigabatch.trainer.objectives import build_objective

SCRIPT = Path(__file__).with_name("objective_ranks.py")
WORLD_SIZES = [
    pytest.param(
        w, marks=[pytest.mark.xdist_group(f"objectives {w}"), *([pytest.mark.slow] * (w > 1))]
    )
    for w in (1, 2, 4)
]


def run_group(world_size: int, folder: Path) -> list[dict[str, Any]]:
    """All cases on `world_size` processes; rank -> case -> results."""
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder / "store", folder, str(rank), str(world_size)],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=570)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, said
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module", params=WORLD_SIZES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_group(request.param, tmp_path_factory.mktemp("ranks"))


def together(found: list[dict[str, Tensor]], taps: tuple[str, ...]) -> dict[str, Tensor]:
    """What the ranks say of the whole batch: means over ranks; rows one after the other."""
    whole = {}
    for name in found[0]:
        parts = [part[name] for part in found]
        if name.removeprefix("d ") in taps:
            whole[name] = torch.cat(parts) / len(found)
        elif name.startswith(("d ", "value")):
            whole[name] = torch.stack(parts).mean(0)
        else:
            whole[name] = parts[0]
    return whole


def exact(case: Case) -> list[dict[str, Tensor]]:
    """Value and gradients of each step, by the formula."""
    torch.manual_seed(0)
    objective = build_objective(settings_of(case), width=6)
    memory: dict[Any, Any] = {}
    results = []
    for step in range(1, case.steps + 1):
        whole = batch(case, step)
        rows = {t: whole.outputs[t].double().requires_grad_() for t in objective.needs.taps}
        teacher = {t: r.double() for t, r in whole.outputs.items() if t.startswith("teacher.")}
        own = {n: p.detach().double().requires_grad_() for n, p in objective.named_parameters()}
        formula: formulas.Formula = getattr(formulas, case.formula)
        value, slope = formula(rows | teacher, own, whole.meta, memory, step, **case.how)
        leaves = {**rows, **own}
        grads = torch.autograd.grad(
            value if slope is None else slope, list(leaves.values()), allow_unused=True
        )
        found = {"value": value.detach()}
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            found[f"d {name}"] = torch.zeros_like(leaf) if grad is None else grad
        results.append(found)
    return results


@pytest.mark.parametrize("name", CASES)
def test_an_objective_equals_its_formula(ranks: Any, name: str) -> None:
    case = CASES[name]
    taps = build_objective(settings_of(case), width=6).needs.taps
    for step, wanted in enumerate(exact(case)):
        found = together([rank[name]["steps"][step] for rank in ranks], taps)
        for what, truth in wanted.items():
            got = found[what].double()
            error = float((got - truth).norm())
            assert error <= 2e-5 * (float(truth.norm()) + 1e-2), (what, step, error, truth)
        assert any(bool(grad.any()) for what, grad in wanted.items() if what.startswith("d "))


@pytest.mark.parametrize("name", CASES)
def test_an_objective_goes_on_from_a_checkpoint_to_the_bit(ranks: Any, name: str) -> None:
    assert all(rank[name]["same"] for rank in ranks)


@pytest.mark.parametrize("name", ["isogclr", "noisy", "queue"])
def test_what_is_kept_does_not_depend_on_the_number_of_ranks(ranks: Any, name: str) -> None:
    alone = run(CASES[name], World(0, 1, torch.device("cpu"), None))["steps"][-1]
    kept = [what for what in alone if what.startswith(("table", "buffer"))]
    assert kept
    for what in kept:
        found = ranks[0][name]["steps"][-1][what]
        torch.testing.assert_close(found, alone[what], equal_nan=True, rtol=1e-4, atol=1e-5)
