"""Averages of the towers over steps: a teacher's weights, and those that are evaluated."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints.format import Checkpoint
from gigabatch.trainer.towers import Towers

EMA = "ema"
"""The file of a checkpoint that holds the averaged weights."""


def average_of(towers: Towers) -> Towers:
    """A copy, whole on every rank, in evaluation mode, that `follow` moves; `towers` not yet in an
    engine."""
    return copy.deepcopy(towers).eval().requires_grad_(False)


def open_ema(towers: Towers, momentum: float, checkpoint: Checkpoint | None) -> Towers | None:
    """The averaged weights as they stand in a checkpoint, or at the start; None where `train.ema`
    is 0. Raises GigabatchError where the checkpoint has none: they cannot be made afterwards."""
    if not momentum:
        return None
    ema = average_of(towers)
    if checkpoint:
        if not checkpoint.has(EMA):
            raise GigabatchError(
                f"train.ema: {checkpoint.path} holds no averaged weights, since the run began "
                "without them. Go on with train.ema=0, or start a new run from its weights with "
                "train.init_from."
            )
        ema.load_state_dict(checkpoint.tensors(EMA))
    return ema


def stored_weights(checkpoint: Checkpoint, wanted: str | None) -> dict[str, Tensor]:
    """A checkpoint's towers as of the `last` step, or their average over steps, `ema`; None: the
    average where it holds one. Raises GigabatchError where it has none, or cannot be read."""
    averaged = checkpoint.has(EMA)
    if wanted == EMA and not averaged:
        raise GigabatchError(
            f"{checkpoint.path}: there are no averaged weights, since its run trains without "
            "train.ema. Take the last step's: --weights last, or train.init_weights=last."
        )
    return checkpoint.tensors(EMA if averaged and wanted != "last" else "towers")


@torch.no_grad()
def follow(
    weights: Iterator[tuple[str, Tensor]], averages: Sequence[tuple[nn.Module, float]]
) -> None:
    """Move each average, given with its momentum m, to the current `weights` w, by the names of
    its state: a <- m a + (1 - m) w; what is no float is copied. Without averages no weight is asked
    for, which would gather it."""
    if not averages:
        return
    states = [(average.state_dict(), momentum) for average, momentum in averages]
    moved: set[int] = set()
    for name, weight in weights:
        for state, momentum in states:
            own = state[name]
            if own.data_ptr() in moved:
                continue  # tied to one before it, under another name
            moved.add(own.data_ptr())
            if own.is_floating_point():
                own.lerp_(weight.to(own.device), 1 - momentum)
            else:
                own.copy_(weight)


def warmed(momentum: float, steps: int) -> float:
    """The momentum after so many steps: small at first, so that the average soon forgets the
    weights that it began with (as in TensorFlow's moving averages)."""
    return min(momentum, (1 + steps) / (10 + steps))
