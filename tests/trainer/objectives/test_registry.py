"""Tests of every registered objective, or of those that OBJECTIVES names.

It equals its float64 reference on 1, 2 and 4 gloo ranks, resumes bit for bit, declares its matrix
passes, and is documented.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROWS, WIDTH, assert_equals_reference, batch, build, examples, selected
from rank_probe import run

from gigabatch.launcher.bench.objectives import benchmark_cases
from gigabatch.trainer.distributed import World
from gigabatch.trainer.objectives import OBJECTIVES

PROBE = Path(__file__).with_name("rank_probe.py")
SINGLE = World(0, 1, torch.device("cpu"), None)
WORLD_SIZES = [
    pytest.param(
        w, marks=[pytest.mark.xdist_group(f"objectives {w}"), *([pytest.mark.slow] * (w > 1))]
    )
    for w in (1, 2, 4)
]


def run_group(world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Run all examples on `world_size` processes; rank -> label -> results."""
    processes = [
        subprocess.Popen(
            [sys.executable, PROBE, folder / "store", folder, str(rank), str(world_size)],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=570)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module", params=WORLD_SIZES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_group(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("label", examples())
def test_objective_equals_its_reference(ranks: Any, label: str) -> None:
    assert_equals_reference([rank[label]["steps"] for rank in ranks], label)


@pytest.mark.parametrize("label", examples())
def test_objective_resumes_bit_for_bit(ranks: Any, label: str) -> None:
    assert all(rank[label]["resumed_equal"] for rank in ranks)


@pytest.mark.parametrize("label", examples())
def test_state_does_not_depend_on_the_number_of_ranks(ranks: Any, label: str) -> None:
    last = ranks[0][label]["steps"][-1]
    names = [name for name in last if name.startswith(("table", "buffer"))]
    single = run(*examples()[label], SINGLE)["steps"][-1] if names else {}
    for name in names:
        torch.testing.assert_close(last[name], single[name], equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", examples())
def test_passes_are_positive_and_scale_with_the_example(label: str) -> None:
    settings, example = examples()[label]
    objective, _ = build(settings, SINGLE)
    outputs = {tap: batch(example, 1).outputs[tap] for tap in objective.needs.taps}
    passes = objective.passes(outputs)
    assert 0 < passes < 100 * ROWS * WIDTH
    assert type(objective).card.passes


@pytest.mark.parametrize("name", selected())
def test_objective_is_documented(name: str) -> None:
    kind = OBJECTIVES[name]
    card = kind.card
    assert all((card.title, card.papers, card.formula, card.passes, card.use))
    assert kind.examples
    for key, field in kind.Settings.model_fields.items():
        assert field.description, f"{name}.{key} has no docstring"


@pytest.mark.parametrize("name", [name for name in selected() if name != "sum"])
def test_objective_has_a_benchmark_case(name: str) -> None:
    assert name in {objective for objective, _ in benchmark_cases().values()}


def test_aliases_name_one_objective_each() -> None:
    aliases = [alias for kind in OBJECTIVES.values() for alias in kind.card.aliases]
    assert len(set(aliases)) == len(aliases)
    assert not set(aliases) & set(OBJECTIVES)
