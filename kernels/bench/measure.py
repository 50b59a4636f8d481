"""Measurement of one problem of `bench kernels`: check all implementations, then time them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gigabatch.kernels.bench.implementations import (
    ITEM,
    TOKENS,
    Implementation,
    Inputs,
    make_inputs,
)
from gigabatch.kernels.bench.machine import free_bytes, gemm_rate, peak_of, seconds
from gigabatch.kernels.bench.peers import first_line
from gigabatch.kernels.bench.report import Record, result_line, summarize

GIB = 2**30
MAX_ROUNDS, ROUNDS_S = 20, 2.0  # no new round starts after ROUNDS_S seconds
LONG_S = 20.0  # a step that takes longer is timed once
GRADIENT_TOLERANCE = 0.05
STEPS = 4  # cost of an implementation, in steps: three forward passes and three full steps


class DeviceLost(Exception):
    """A permanent error: no later work on the device can succeed."""


@dataclass(frozen=True)
class Problem:
    """Inputs to measure. `once`: so large that only one step, forward and backward, runs."""

    family: str
    n: int
    d: int
    logits: str
    device: str
    once: bool = False

    def flops(self) -> int:
        """Return the FLOP count of a step, the same for all implementations.

        It is 2 n n d per matrix pass of an implementation that stores no scores. A softmax has 4
        passes (scores; scores again; two gradients), a sigmoid 3. For MaxSim the passes are over
        all pairs of tokens, and there are 3: the products and their two gradients in plain torch. A
        gradient that follows only the maxima takes less; recomputing products takes more.
        """
        pairs = self.n**2
        if self.family == "maxsim":
            pairs = (self.n // ITEM) ** 2 * math.prod(TOKENS[self.device])
        return 2 * (4 if self.family == "softmax" else 3) * pairs * self.d

    def __str__(self) -> str:
        return f"{self.family}, N {self.n:,}, D {self.d}, {self.logits} logits"


@dataclass(frozen=True)
class Step:
    """One timed step. `peak` are bytes above inputs and gradients; None on a CPU."""

    loss: float
    seconds: float
    peak: int | None

    def add_to(self, record: Record) -> None:
        record.setdefault("step_s", []).append(self.seconds)
        record["peak_bytes"] = self.peak


class Measure:
    """Measurement of several problems under a time budget.

    An implementation that failed is not tried at a larger size. The time of its last step predicts
    whether a larger one fits into the remaining time.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, deadline: float, say: Callable[[str], None]
    ) -> None:
        self.device, self.dtype, self.deadline, self.say = device, dtype, deadline, say
        self.tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        self.failed: dict[tuple[str, int, str], tuple[int, str]] = {}  # n and the reason
        self.took: dict[tuple[str, int, str], tuple[int, float]] = {}  # the last n, seconds

    def seconds_left(self) -> float:
        """Return the seconds left of the budget."""
        return self.deadline - time.monotonic()

    def run(self, problem: Problem, able: Sequence[Implementation], problems: list[Record]) -> None:
        """Append the problem's record to `problems`, and then fill it, so that an interrupted run
        keeps what was measured."""
        rate = gemm_rate(self.device, self.dtype)
        records: list[Record] = [{"name": i.name, "reason": ""} for i in able]
        facts = {**vars(problem), "flops": problem.flops(), "gemm_flops_per_s": rate}
        problems.append({**facts, "contenders": records})
        self.say(f"{problem} (matmul {rate / 1e12:.3g} TFLOP/s)")
        shape = (problem.family, problem.n, problem.d, problem.logits)
        try:
            with self._recording_errors(problem, *records):
                inputs = make_inputs(*shape, self.dtype, self.device)
                self._check(problem, able, records, inputs)
                if not problem.once:
                    self._rounds(problem, able, records, inputs)
        finally:
            for record in records:
                summarize(record, problem.flops(), rate)
                self.say(f"  {record['name']:<20} {result_line(record)}")

    def _check(
        self,
        problem: Problem,
        able: Sequence[Implementation],
        records: list[Record],
        inputs: Inputs,
    ) -> None:
        """Run a first step of each implementation. It compiles, so it is not timed unless it is the
        only step.

        Losses must agree with that of the first implementation that runs. Gradients of q should
        agree, too, except for a dense form in half precision, which rounds the logits.
        """
        first: tuple[float, torch.Tensor] | None = None
        for implementation, record in zip(able, records, strict=True):
            record["reason"] = self._skip_reason(problem, implementation)
            if not record["reason"] and not problem.once:
                self._forward(problem, implementation, record, inputs)
            step = None if record["reason"] else self._step(problem, implementation, record, inputs)
            grad = inputs.q.grad
            if step is None or grad is None:
                continue
            first = first or (step.loss, grad)
            error = abs(step.loss - first[0]) / max(abs(first[0]), 1e-6)
            grad_error = float((grad - first[1]).norm() / first[1].norm())
            record["loss"], record["agrees"] = _finite(step.loss), error <= self.tolerance
            record["difference"] = _finite(error)
            record["gradient_difference"] = _finite(grad_error)
            record["gradient_agrees"] = grad_error <= GRADIENT_TOLERANCE
            if not record["agrees"]:
                self.say(f"  !!! {implementation.name} DISAGREES: its loss is {step.loss:.6g}, "
                         f"that of the first implementation {first[0]:.6g}")  # fmt: skip
            if problem.once:
                step.add_to(record)
        inputs.clear()

    def _skip_reason(self, problem: Problem, implementation: Implementation) -> str:
        """Return why an implementation must be skipped at this size, or ""."""
        key = (problem.family, problem.d, implementation.name)
        if key in self.failed and problem.n >= self.failed[key][0]:
            n, reason = self.failed[key]
            return f"failed at N {n:,}: {reason}"
        needed = implementation.pair_bytes * problem.n**2
        if needed > free_bytes(self.device):
            return f"would take {needed / GIB:,.2f} GiB"
        if key in self.took:
            n, step = self.took[key]
            expected = step * (problem.n / n) ** 2 * (1 if problem.once else STEPS)
            left = max(0.0, self.seconds_left())
            if expected > left:
                return f"would take {expected:.0f} s of {left:.0f} s left"
        return ""

    def _rounds(
        self,
        problem: Problem,
        able: Sequence[Implementation],
        records: list[Record],
        inputs: Inputs,
    ) -> None:
        """Time all implementations in turns."""
        began = time.monotonic()
        for done in range(MAX_ROUNDS):
            slowest = 0.0
            for implementation, record in zip(able, records, strict=True):
                if record["reason"]:
                    continue
                forward = self._forward(problem, implementation, record, inputs)
                step = forward and self._step(problem, implementation, record, inputs)
                if forward and step:
                    record.setdefault("forward_s", []).append(forward)
                    step.add_to(record)
                    slowest = max(slowest, step.seconds)
            inputs.clear()
            enough = 1 if slowest > LONG_S else 2
            if done + 1 >= enough and time.monotonic() - began > ROUNDS_S:
                break

    def _forward(
        self, problem: Problem, implementation: Implementation, record: Record, inputs: Inputs
    ) -> float | None:
        """Time the loss without gradient, in seconds; None after an error."""
        with self._recording_errors(problem, record), torch.no_grad():
            return seconds(lambda: implementation.loss(inputs), self.device)
        return None

    def _step(
        self, problem: Problem, implementation: Implementation, record: Record, inputs: Inputs
    ) -> Step | None:
        """Run forward and backward; None after an error."""
        losses: list[torch.Tensor] = []

        def step() -> None:
            loss = implementation.loss(inputs)
            loss.backward()
            losses.append(loss.detach())

        inputs.clear()
        with self._recording_errors(problem, record):
            took, peak = peak_of(lambda: seconds(step, self.device), self.device)
            self.took[problem.family, problem.d, implementation.name] = (problem.n, took)
            grads = sum(leaf.grad.nbytes for leaf in inputs.leaves if leaf.grad is not None)
            return Step(float(losses[0]), took, None if peak is None else max(0, peak - grads))
        return None

    @contextmanager
    def _recording_errors(self, problem: Problem, *records: Record) -> Iterator[None]:
        """Record any error, such as out of memory, as the reason why these records end here."""
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            for record in records:
                record["reason"] = first_line(error)
                self.failed[problem.family, problem.d, record["name"]] = problem.n, record["reason"]
            try:
                seconds(lambda: None, self.device)
            except Exception:
                raise DeviceLost(first_line(error)) from error


def _finite(value: float) -> float | None:
    """Return None instead of NaN or infinity, which JSON lacks."""
    return value if math.isfinite(value) else None
