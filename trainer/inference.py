"""A run's towers for use after training: no DeepSpeed, no process group."""

from __future__ import annotations

from gigabatch.data.errors import GigabatchError
from gigabatch.data.tokenizer import load_tokenizer
from gigabatch.trainer.checkpoint import latest_checkpoint
from gigabatch.trainer.runfolder import RunFolder
from gigabatch.trainer.towers import Towers, build_towers


def load_newest_towers(run: RunFolder) -> tuple[int, Towers]:
    """(step, towers in evaluation mode, on the CPU) of the newest sound checkpoint.

    Raises GigabatchError where there is none.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise GigabatchError(f"{run.path}: there is no checkpoint yet; train first.")
    towers = build_towers(run.config(), load_tokenizer(run.tokenizer).get_vocab_size())
    towers.load_state_dict(checkpoint.tensors("towers"), strict=True)
    return checkpoint.step, towers.eval()
