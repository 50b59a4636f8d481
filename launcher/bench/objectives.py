"""`gigabatch bench objectives`: the step of each objective beside InfoNCE's, by matrix passes.

Forward and backward of the real objective on random unit vectors, in one process without towers:

    quotient = (seconds / InfoNCE's seconds) / (its matrix products / InfoNCE's)

is what an objective takes over what it declares. Each step is timed right after one of InfoNCE's,
and the quotient is the median over such pairs: a busy machine slows both.
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
"""Tokens per item for late interaction: its tokens are as many as the other objectives' rows."""


def benchmark_cases() -> dict[str, tuple[str, Benchmark]]:
    """Return the benchmark cases of all objectives: label -> (objective, case)."""
    return {
        f"{name}, {label}" if label else name: (name, case)
        for name, kind in OBJECTIVES.items()
        for label, case in kind.benchmarks.items()
    }


@dataclass
class Subject:
    """One objective with its inputs. `work`: its matrix products, in numbers multiplied."""

    step: Callable[[], None]
    samples: int
    passes: float
    work: float
    times: list[tuple[float, float]] = field(default_factory=list)  # wall clock, processor


def bench(
    size: int, width: int, rounds: int, only: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Every case whose objective is among `only`, or all. Raises GigabatchError for a name that
    there is not."""
    cases = benchmark_cases()
    known = {objective for objective, _ in cases.values()}
    if unknown := set(only) - known:
        raise GigabatchError(
            f"there is no objective {', '.join(sorted(unknown))} here; there are "
            f"{', '.join(sorted(known))}."
        )
    chosen = {label: case for label, case in cases.items() if not only or case[0] in only}
    found = []
    say(f"{'objective':30} {'samples':>7} {'passes':>7} {'seconds':>8} {'quotient':>8}")
    for name, (objective, case) in chosen.items():
        found.append({"objective": name, **_measure(objective, case, size, width, rounds)})
        told = found[-1]
        say(
            f"{name:30} {told['samples']:7,} {told['passes']:7.4g} {told['seconds']:8.3g} "
            f"{told['quotient']:8.2f}"
            + (f"  above {MAX_QUOTIENT}" if told["quotient"] > MAX_QUOTIENT else "")
        )
    return {"size": size, "width": width, **environment(CPU), "objectives": found}


def _measure(objective: str, case: Benchmark, size: int, width: int, rounds: int) -> dict[str, Any]:
    """`quotient` by the wall clock, `processor_quotient` by the time on processors."""
    base = _subject("infonce", Benchmark(), size, width)
    mine = _subject(objective, case, size, width)
    for subject in (base, mine):
        subject.step()  # buffers are found, a queue is filled
    for _ in range(rounds):
        for subject in (base, mine):
            began = time.perf_counter(), time.process_time()
            subject.step()
            subject.times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    fair = mine.work / base.work
    pairs = [
        [a / b / fair for a, b in zip(own, other, strict=True)]
        for own, other in zip(mine.times, base.times, strict=True)
    ]
    wall, processor = (median(column) for column in zip(*pairs, strict=True))
    return {
        "settings": {"name": objective, **case.settings}, "samples": mine.samples,
        "passes": mine.passes,
        "seconds": median(t for t, _ in mine.times),
        "infonce_seconds": median(t for t, _ in base.times),
        "quotient": wall, "processor_quotient": processor,
    }  # fmt: skip


def _subject(name: str, case: Benchmark, size: int, width: int) -> Subject:
    torch.manual_seed(0)  # of parameters
    n = max(2, int(size * case.share))
    objective = build_objective(parse_settings({"name": name, **case.settings}), width=width)
    state = ObjectiveState(objective, [n], None, World(0, 1, CPU, None))
    rows, teacher, meta = make_inputs(objective.needs, n, width, case)
    passes = objective.passes(rows)

    def step() -> None:
        objective.zero_grad()
        for each in rows.values():
            each.grad = None
        ctx = Context(None, 1)
        loss = objective({**rows, **teacher}, meta | state.read(meta["sample"]), ctx)
        loss.value.backward()
        state.commit(loss.updates(), meta["sample"])

    return Subject(step, n, passes, passes * n * n * width)


def make_inputs(
    needs: Needs, n: int, width: int, case: Benchmark
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Of n samples: vectors of each tap, with gradients; a teacher's, without; columns. Two samples
    share a `concept` on average, a quarter has each `lang`, an eightieth each `age`."""
    g = torch.Generator().manual_seed(n)

    def vectors(tap: str) -> Tensor:
        shape = (n, TOKENS, width) if parse_tap(tap).place == "tokens" else (n, width)
        if parse_tap(tap).modality == "text" and case.captions > 1:
            shape = (n * case.captions, width)
        return F.normalize(torch.randn(shape, generator=g), dim=-1)

    number = torch.arange(n)
    meta = {
        "sample": number,
        "concept": torch.randint(0, math.ceil(n / 2), (n,), generator=g),
        "lang": torch.randint(0, 4, (n,), generator=g),
        "pair": number // 2,
        "changed": number % 2,
        "age": torch.randint(0, 80, (n,), generator=g).float(),
        "text_mask": torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (n, 1), generator=g),
    }
    for name, each in needs.vectors.items():
        meta[name] = torch.randn(n, each.size, generator=g)
    rows = {tap: vectors(tap).requires_grad_() for tap in needs.taps}
    return rows, {TEACHER + tap: vectors(tap) for tap in needs.teacher}, meta
