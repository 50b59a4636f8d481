"""A run's towers for use after training: no DeepSpeed, no process group."""

from __future__ import annotations

from gigabatch.data.errors import GigabatchError
from gigabatch.data.tokenizer import load_tokenizer
from gigabatch.trainer.checkpoint import latest_checkpoint
from gigabatch.trainer.runfolder import RunFolder
from gigabatch.trainer.state.average import EMA
from gigabatch.trainer.towers import Towers, build_towers


def load_newest_towers(run: RunFolder, weights: str | None = None) -> tuple[int, Towers]:
    """(step, towers in evaluation mode, on the CPU) of the newest sound checkpoint. `weights`:
    ema, their average over steps (`train.ema`), or last; None: ema where the run has one.

    Raises GigabatchError where there is none.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise GigabatchError(f"{run.path}: there is no checkpoint yet; train first.")
    averaged = checkpoint.has(EMA)
    if weights == EMA and not averaged:
        raise GigabatchError(
            f"{run.path}: there are no averaged weights, since the run trains without train.ema. "
            "Take --weights last."
        )
    chosen = EMA if averaged and weights != "last" else "towers"
    towers = build_towers(run.config(), load_tokenizer(run.tokenizer).get_vocab_size())
    towers.load_state_dict(checkpoint.tensors(chosen), strict=True)
    return checkpoint.step, towers.eval()
