"""One problem of `bench kernels`: all contenders checked, then timed in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gigabatch.kernels.bench.contenders import ITEM, TOKENS, Contender, Inputs, make_inputs
from gigabatch.kernels.bench.machine import free_bytes, gemm_rate, peak_of, seconds
from gigabatch.kernels.bench.peers import first_line
from gigabatch.kernels.bench.report import Record, figures, summarise

GIB = 2**30
ROUNDS, SLOT_S = 20, 2.0  # at most so many, and no new one after so long
LONG_S = 20.0  # a step that takes longer is timed once
GRADIENT_TOLERANCE = 0.05
STEPS = 4  # what a contender costs, in steps: three of forward alone, three of both


class DeviceLost(Exception):
    """An error that stays: no later work on the device can succeed."""


@dataclass(frozen=True)
class Problem:
    """`once`: so large that a single step, forward and backward, has to do."""

    family: str
    n: int
    d: int
    logits: str
    device: str
    once: bool = False

    def flops(self) -> int:
        """Of a step, whoever takes it: 2 n n d for each matrix pass of one that stores no scores. A
        softmax has 4 (scores; scores again; two gradients), a sigmoid 3. For MaxSim the passes are
        over all pairs of tokens, and the count is 3, the products and their two gradients in plain
        torch: a gradient that follows the maxima alone takes less, one that makes products again
        more."""
        pairs = self.n**2
        if self.family == "maxsim":
            pairs = (self.n // ITEM) ** 2 * math.prod(TOKENS[self.device])
        return 2 * (4 if self.family == "softmax" else 3) * pairs * self.d

    def __str__(self) -> str:
        return f"{self.family}, N {self.n:,}, D {self.d}, {self.logits} logits"


@dataclass(frozen=True)
class Step:
    """`peak`: bytes above inputs and gradients; None on a CPU."""

    loss: float
    seconds: float
    peak: int | None

    def add_to(self, record: Record) -> None:
        record.setdefault("step_s", []).append(self.seconds)
        record["peak_bytes"] = self.peak


class Measure:
    """Of several problems: what failed is not tried at a larger size, and what a step took says
    whether a larger one fits into the time left."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, deadline: float, say: Callable[[str], None]
    ) -> None:
        self.device, self.dtype, self.deadline, self.say = device, dtype, deadline, say
        self.tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        self.failed: dict[tuple[str, int, str], tuple[int, str]] = {}  # at which n, and how
        self.took: dict[tuple[str, int, str], tuple[int, float]] = {}  # the last n, seconds

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def run(self, problem: Problem, able: Sequence[Contender], found: list[Record]) -> None:
        """Adds the problem's figures to `found` at once, and to them as they come."""
        rate = gemm_rate(self.device, self.dtype)
        records: list[Record] = [{"name": contender.name, "reason": ""} for contender in able]
        given = {**vars(problem), "flops": problem.flops(), "gemm_flops_per_s": rate}
        found.append({**given, "contenders": records})
        self.say(f"{problem} (matmul {rate / 1e12:.3g} TFLOP/s)")
        shape = (problem.family, problem.n, problem.d, problem.logits)
        try:
            with self._noting(problem, *records):
                inputs = make_inputs(*shape, self.dtype, self.device)
                self._check(problem, able, records, inputs)
                if not problem.once:
                    self._rounds(problem, able, records, inputs)
        finally:
            for record in records:
                summarise(record, problem.flops(), rate)
                self.say(f"  {record['name']:<20} {figures(record)}")

    def _check(
        self, problem: Problem, able: Sequence[Contender], records: list[Record], inputs: Inputs
    ) -> None:
        """A first step of each, untimed (it compiles) but where it is the only one. Losses must
        agree with that of the first that runs, and so should q's gradient: a dense form's in half
        precision need not, for it rounds the logits."""
        first: tuple[float, torch.Tensor] | None = None
        for contender, record in zip(able, records, strict=True):
            record["reason"] = self._refuse(problem, contender)
            if not record["reason"] and not problem.once:
                self._forward(problem, contender, record, inputs)
            step = None if record["reason"] else self._step(problem, contender, record, inputs)
            grad = inputs.q.grad
            if step is None or grad is None:
                continue
            first = first or (step.loss, grad)
            off = abs(step.loss - first[0]) / max(abs(first[0]), 1e-6)
            grad_off = float((grad - first[1]).norm() / first[1].norm())
            record["loss"], record["agrees"] = _finite(step.loss), off <= self.tolerance
            record["difference"], record["gradient_difference"] = _finite(off), _finite(grad_off)
            record["gradient_agrees"] = grad_off <= GRADIENT_TOLERANCE
            if not record["agrees"]:
                self.say(f"  !!! {contender.name} DISAGREES: its loss is {step.loss:.6g}, that of "
                         f"the first {first[0]:.6g}")  # fmt: skip
            if problem.once:
                step.add_to(record)
        inputs.clear()

    def _refuse(self, problem: Problem, contender: Contender) -> str:
        """Why a contender is not to be tried at this size, if it is not."""
        key = (problem.family, problem.d, contender.name)
        if key in self.failed and problem.n >= self.failed[key][0]:
            n, how = self.failed[key]
            return f"failed at N {n:,}: {how}"
        needs = contender.pair_bytes * problem.n**2
        if needs > free_bytes(self.device):
            return f"would take {needs / GIB:,.2f} GiB"
        if key in self.took:
            n, step = self.took[key]
            expected = step * (problem.n / n) ** 2 * (1 if problem.once else STEPS)
            if expected > self.left():
                return f"would take {expected:.0f} s of {max(0.0, self.left()):.0f} s left"
        return ""

    def _rounds(
        self, problem: Problem, able: Sequence[Contender], records: list[Record], inputs: Inputs
    ) -> None:
        began = time.monotonic()
        for done in range(ROUNDS):
            slowest = 0.0
            for contender, record in zip(able, records, strict=True):
                if record["reason"]:
                    continue
                forward = self._forward(problem, contender, record, inputs)
                step = forward and self._step(problem, contender, record, inputs)
                if forward and step:
                    record.setdefault("forward_s", []).append(forward)
                    step.add_to(record)
                    slowest = max(slowest, step.seconds)
            inputs.clear()
            enough = 1 if slowest > LONG_S else 2
            if done + 1 >= enough and time.monotonic() - began > SLOT_S:
                break

    def _forward(
        self, problem: Problem, contender: Contender, record: Record, inputs: Inputs
    ) -> float | None:
        """Seconds of the loss alone, no gradient wanted; None after an error."""
        with self._noting(problem, record), torch.no_grad():
            return seconds(lambda: contender.loss(inputs), self.device)
        return None

    def _step(
        self, problem: Problem, contender: Contender, record: Record, inputs: Inputs
    ) -> Step | None:
        """Forward and backward; None after an error."""
        losses: list[torch.Tensor] = []

        def step() -> None:
            loss = contender.loss(inputs)
            loss.backward()
            losses.append(loss.detach())

        inputs.clear()
        with self._noting(problem, record):
            took, peak = peak_of(lambda: seconds(step, self.device), self.device)
            self.took[problem.family, problem.d, contender.name] = (problem.n, took)
            grads = sum(leaf.grad.nbytes for leaf in inputs.leaves if leaf.grad is not None)
            return Step(float(losses[0]), took, None if peak is None else max(0, peak - grads))
        return None

    @contextmanager
    def _noting(self, problem: Problem, *records: Record) -> Iterator[None]:
        """Whatever is raised, out of memory or another package's, ends these contenders alone."""
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
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None
