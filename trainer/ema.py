"""Averages of the towers' weights over steps: momentum towers, and weights for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints.format import Checkpoint
from gigabatch.trainer.towers import Towers

EMA = "ema"
"""Name of the checkpoint file that holds the averaged weights."""


def frozen_copy(towers: Towers) -> Towers:
    """Copy towers that are not yet in an engine: complete on every rank, in evaluation mode."""
    return copy.deepcopy(towers).eval().requires_grad_(False)


def open_ema(towers: Towers, momentum: float, checkpoint: Checkpoint | None) -> Towers | None:
    """Return towers with the averaged weights of a checkpoint, or with the initial weights.

    Args:
        towers: The towers, not yet in an engine.
        momentum: `train.ema`; with 0, None is returned.
        checkpoint: Checkpoint to resume, if any.

    Raises:
        GigabatchError: if the checkpoint has no averaged weights.
    """
    if not momentum:
        return None
    ema = frozen_copy(towers)
    if checkpoint:
        if not checkpoint.has(EMA):
            raise GigabatchError(
                f"train.ema: {checkpoint.path} has no averaged weights, because the run started "
                "without train.ema. Resume with train.ema=0, or start a new run from its weights "
                "with train.init_from."
            )
        ema.load_state_dict(checkpoint.tensors(EMA))
    return ema


def stored_weights(checkpoint: Checkpoint, weights: str | None) -> dict[str, Tensor]:
    """Return the towers' weights of a checkpoint.

    Args:
        checkpoint: A verified checkpoint.
        weights: `last` for the weights of the last step, `ema` for their average over steps; None
            means the average if the checkpoint has one.

    Raises:
        GigabatchError: if the checkpoint has no average, or cannot be read.
    """
    has_average = checkpoint.has(EMA)
    if weights == EMA and not has_average:
        raise GigabatchError(
            f"{checkpoint.path}: there are no averaged weights, because the run trains without "
            "train.ema. Use the last step's weights: --weights last, or train.init_weights=last."
        )
    return checkpoint.tensors(EMA if has_average and weights != "last" else "towers")


@torch.no_grad()
def update_averages(
    weights: Iterator[tuple[str, Tensor]], averages: Sequence[tuple[nn.Module, float]]
) -> None:
    """Move each average a towards the weights w in place: a <- m a + (1 - m) w.

    Args:
        weights: (state name, tensor) of each current weight. Not iterated if there are no
            averages, because under ZeRO 3 each item gathers a weight.
        averages: (module, momentum m) of each average. Integer buffers are copied.
    """
    if not averages:
        return
    states = [(average.state_dict(), momentum) for average, momentum in averages]
    updated: set[int] = set()
    for name, weight in weights:
        for state, momentum in states:
            average = state[name]
            if average.data_ptr() in updated:
                continue  # The same tensor under a second name: tied weights.
            updated.add(average.data_ptr())
            if average.is_floating_point():
                average.lerp_(weight.to(average.device), 1 - momentum)
            else:
                average.copy_(weight)


def warmup_momentum(momentum: float, steps: int) -> float:
    """Return the momentum after `steps` applied steps, at most (1 + steps) / (10 + steps).

    With a small momentum in the first steps, the average forgets the initial weights, as in
    TensorFlow's moving averages.
    """
    return min(momentum, (1 + steps) / (10 + steps))
