"""A run's towers and objective for use after training, without DeepSpeed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.tokenizer import load_tokenizer
from gigabatch.trainer.agreement import agree_on_checkpoint
from gigabatch.trainer.checkpoints.format import checkpoint_at, latest_checkpoint
from gigabatch.trainer.distributed import World
from gigabatch.trainer.ema import stored_weights
from gigabatch.trainer.objective_state import TABLE
from gigabatch.trainer.objectives import Objective, build_objective
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.towers import Towers, build_towers


def load_newest_towers(
    run: RunFolder, world: World | None = None, weights: str | None = None
) -> tuple[int, Towers]:
    """Load the towers of the newest valid checkpoint.

    Args:
        run: The run.
        world: Ranks that must load the same checkpoint; None for a single process.
        weights: `ema` for the average over steps (`train.ema`), `last` for the weights of the last
            step; None means the average if the run has one.

    Returns:
        (step, towers in evaluation mode on the CPU).

    Raises:
        GigabatchError: if there is no valid checkpoint.
    """
    checkpoint = agree_on_checkpoint(run, world) if world else latest_checkpoint(run)
    if checkpoint is None:
        raise GigabatchError(f"{run.path}: there is no checkpoint yet; train first.")
    state = stored_weights(checkpoint, weights)
    towers = build_towers(run.config(), load_tokenizer(run.tokenizer).get_vocab_size())
    towers.load_state_dict(state, strict=True)
    return checkpoint.step, towers.eval()


def load_objective(run: RunFolder, step: int) -> tuple[Objective[Any], dict[str, Tensor]]:
    """Load the objective of a verified checkpoint.

    Returns:
        (objective on the CPU, table name -> float32 [samples, F] of all sources in order).

    Raises:
        GigabatchError: if the checkpoint cannot be read.
    """
    config = run.config()
    state = checkpoint_at(run, step).tensors("objective")
    settings = config.objective.for_any_device()
    objective = build_objective(settings, "cpu", config.data.group, config.towers.width)
    objective.load_state_dict({name: state[name] for name in objective.state_dict()})
    return objective, {name: state[TABLE + name] for name in objective.needs.tables}
