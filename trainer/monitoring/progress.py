"""Where a rank is in its run, and how long it computed: its main thread writes, others read."""

from __future__ import annotations

import time

import torch

PHASES = ("data", "embed", "loss", "backward", "step", "save", "evaluate")
"""In the order in which a step goes through them."""
BUSY = ("data", "embed", "backward")
"""Phases that wait for no other rank (under ZeRO 3, which gathers weights in them, they do)."""


class Progress:
    """`step`: in progress (while evaluating: done). `since`: monotonic s of the last sign of
    progress: a phase begun, a micro-batch embedded or measured."""

    def __init__(self, device: torch.device, step: int = 0) -> None:
        self.device, self.step, self.phase = device, step, "data"
        self.since = self.entered = time.monotonic()
        self.wall = time.time()
        self.spent = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str, step: int | None = None) -> None:
        """A phase begins, or gets on. Ends the one before."""
        if phase != self.phase:
            if self.device.type == "cuda" and self.phase in ("embed", "backward"):
                torch.cuda.synchronize(self.device)  # until here kernels were only queued
            now = time.monotonic()
            self.spent[self.phase] += now - self.entered
            self.entered = now
        self.phase = phase
        self.step = self.step if step is None else step
        self.since, self.wall = time.monotonic(), time.time()

    def take_busy(self) -> float:
        """Seconds spent in BUSY phases that have ended since this was last called."""
        busy = sum(self.spent[phase] for phase in BUSY)
        self.spent = dict.fromkeys(PHASES, 0.0)
        return busy
