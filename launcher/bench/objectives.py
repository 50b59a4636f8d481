"""Command `gigabatch bench objectives`: step time of each objective relative to its declared cost.

Each objective runs forward and backward on random unit vectors, in one process without towers. Its
time relative to InfoNCE is divided by its number of matrix products relative to InfoNCE:

    quotient = (seconds / InfoNCE's seconds) / (its matrix products / InfoNCE's)

Each step is timed right after one of InfoNCE, and the quotient is the median over such pairs, so
that other load on the machine affects both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.kernels.bench.machine import environment
from gigabatch.trainer.distributed import World
from gigabatch.trainer.objective_state import ObjectiveState
from gigabatch.trainer.objectives import (
    OBJECTIVES,
    Context,
    Needs,
    build_objective,
    parse_settings,
)
from gigabatch.trainer.objectives.reference import Benchmark
from gigabatch.trainer.taps import TEACHER, parse_tap

MAX_QUOTIENT = 1.25
CPU = torch.device("cpu")
TOKENS = 16
"""Tokens per item in late interaction; items times tokens equals the rows of other objectives."""


def benchmark_cases() -> dict[str, tuple[str, Benchmark]]:
    """Return the benchmark cases of all objectives: label -> (objective, case)."""
    return {
        f"{name}, {label}" if label else name: (name, case)
        for name, kind in OBJECTIVES.items()
        for label, case in kind.benchmarks.items()
    }


@dataclass
class Subject:
    """One objective with its inputs.

    Attributes:
        step: Runs forward and backward.
        samples: Number of samples in a step.
        passes: Number of matrix passes that the objective declares.
        work: Number of multiplications of these passes.
        times: Wall-clock and processor seconds of each step.
    """

    step: Callable[[], None]
    samples: int
    passes: float
    work: float
    times: list[tuple[float, float]] = field(default_factory=list)


def bench(
    size: int, width: int, rounds: int, only: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Time the objectives.

    Args:
        size: Number of rows of InfoNCE.
        width: Embedding dimension.
        rounds: Number of timed steps of each objective.
        only: Names of objectives to time; empty times all.
        say: Called with a line of results after each objective.

    Returns:
        Results as JSON values.

    Raises:
        GigabatchError: if `only` contains an unknown name.
    """
    cases = benchmark_cases()
    known = {objective for objective, _ in cases.values()}
    if unknown := set(only) - known:
        raise GigabatchError(
            f"unknown objective {', '.join(sorted(unknown))}; choose from "
            f"{', '.join(sorted(known))}."
        )
    chosen = {label: case for label, case in cases.items() if not only or case[0] in only}
    results = []
    say(f"{'objective':30} {'samples':>7} {'passes':>7} {'seconds':>8} {'quotient':>8}")
    for name, (objective, case) in chosen.items():
        result = {"objective": name, **_measure(objective, case, size, width, rounds)}
        results.append(result)
        above = f"  above {MAX_QUOTIENT}" if result["quotient"] > MAX_QUOTIENT else ""
        say(
            f"{name:30} {result['samples']:7,} {result['passes']:7.4g} {result['seconds']:8.3g} "
            f"{result['quotient']:8.2f}{above}"
        )
    return {"size": size, "width": width, **environment(CPU), "objectives": results}


def _measure(objective: str, case: Benchmark, size: int, width: int, rounds: int) -> dict[str, Any]:
    """Return JSON values; `quotient` uses the wall clock, `processor_quotient` processor time."""
    base = _subject("infonce", Benchmark(), size, width)
    tested = _subject(objective, case, size, width)
    for subject in (base, tested):
        subject.step()  # Warm-up: allocates buffers and fills queues.
    for _ in range(rounds):
        for subject in (base, tested):
            wall, cpu = time.perf_counter(), time.process_time()
            subject.step()
            subject.times.append((time.perf_counter() - wall, time.process_time() - cpu))
    declared = tested.work / base.work
    pairs = [
        [seconds / base_seconds / declared for seconds, base_seconds in zip(*pair, strict=True)]
        for pair in zip(tested.times, base.times, strict=True)
    ]
    quotient, processor_quotient = (median(column) for column in zip(*pairs, strict=True))
    return {
        "settings": {"name": objective, **case.settings}, "samples": tested.samples,
        "passes": tested.passes,
        "seconds": median(t for t, _ in tested.times),
        "infonce_seconds": median(t for t, _ in base.times),
        "quotient": quotient, "processor_quotient": processor_quotient,
    }  # fmt: skip


def _subject(name: str, case: Benchmark, size: int, width: int) -> Subject:
    torch.manual_seed(0)  # Initial values of the objective's parameters.
    n = max(2, int(size * case.share))
    objective = build_objective(parse_settings({"name": name, **case.settings}), width=width)
    state = ObjectiveState(objective, [n], None, World(0, 1, CPU, None))
    rows, teacher, meta = make_inputs(objective.needs, n, width, case)
    passes = objective.passes(rows)

    def step() -> None:
        objective.zero_grad()
        for vectors in rows.values():
            vectors.grad = None
        ctx = Context(None, 1)
        loss = objective({**rows, **teacher}, meta | state.read(meta["sample"]), ctx)
        loss.value.backward()
        state.commit(loss.updates(), meta["sample"])

    return Subject(step, n, passes, passes * n * n * width)


def make_inputs(
    needs: Needs, n: int, width: int, case: Benchmark
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Create random inputs of n samples.

    Args:
        needs: Inputs of the objective.
        n: Number of samples.
        width: Embedding dimension.
        case: Benchmark case of the objective.

    Returns:
        (unit vectors float32 [rows, width] of each tap, with gradients; those of teacher taps,
        without gradients; columns [n]). On average two samples share a `concept`. `lang` has 4
        values, and `age` 80.
    """
    g = torch.Generator().manual_seed(n)

    def vectors(tap: str) -> Tensor:
        shape = (n, TOKENS, width) if parse_tap(tap).output == "tokens" else (n, width)
        if parse_tap(tap).modality == "text" and case.captions > 1:
            shape = (n * case.captions, width)
        return F.normalize(torch.randn(shape, generator=g), dim=-1)

    samples = torch.arange(n)
    meta = {
        "sample": samples,
        "concept": torch.randint(0, math.ceil(n / 2), (n,), generator=g),
        "lang": torch.randint(0, 4, (n,), generator=g),
        "pair": samples // 2,
        "changed": samples % 2,
        "age": torch.randint(0, 80, (n,), generator=g).float(),
        "text_mask": torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (n, 1), generator=g),
    }
    for name, vector in needs.vectors.items():
        meta[name] = torch.randn(n, vector.size, generator=g)
    rows = {tap: vectors(tap).requires_grad_() for tap in needs.taps}
    return rows, {TEACHER + tap: vectors(tap) for tap in needs.teacher}, meta
