"""Current step and phase of a rank, and its computing time. Only the main thread writes it."""

from __future__ import annotations

import time

import torch

PHASES = ("data", "embed", "loss", "backward", "step", "save", "evaluate")
"""Phases of a step, in order."""
BUSY = ("data", "embed", "backward")
"""Phases that do not wait for other ranks, except under ZeRO 3, which gathers weights in them."""


class Progress:
    """The progress of one rank.

    Attributes:
        step: Step in progress; while evaluating, the last step done.
        phase: Current phase.
        since: Monotonic time in seconds of the last progress, which is a new phase, or a further
            micro-batch embedded or evaluated.
        wall: Wall-clock time of the same moment.
    """

    def __init__(self, device: torch.device, step: int = 0) -> None:
        self.device, self.step, self.phase = device, step, "data"
        self.since = self.entered = time.monotonic()
        self.wall = time.time()
        self.spent = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Enter a phase, or report progress within it."""
        if phase != self.phase:
            if self.device.type == "cuda" and self.phase in ("embed", "backward"):
                torch.cuda.synchronize(self.device)  # Kernels so far were only queued.
            now = time.monotonic()
            self.spent[self.phase] += now - self.entered
            self.entered = now
        self.phase = phase
        self.step = self.step if step is None else step
        self.since, self.wall = time.monotonic(), time.time()

    def take_busy(self) -> float:
        """Return the seconds spent in finished BUSY phases since the last call."""
        busy = sum(self.spent[phase] for phase in BUSY)
        self.spent = dict.fromkeys(PHASES, 0.0)
        return busy
