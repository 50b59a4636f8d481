"""A run's towers for use after training: no DeepSpeed."""

from __future__ import annotations

from gigabatch.data.errors import GigabatchError
from gigabatch.data.tokenizer import load_tokenizer
from gigabatch.trainer.agreement import agree_on_checkpoint
from gigabatch.trainer.checkpoint import latest_checkpoint
from gigabatch.trainer.distributed import World
from gigabatch.trainer.runfolder import RunFolder
from gigabatch.trainer.towers import Towers, build_towers


def load_newest_towers(run: RunFolder, world: World | None = None) -> tuple[int, Towers]:
    """(step, towers in evaluation mode, on the CPU) of the newest sound checkpoint, the same on
    every rank of `world`; without one this process is alone.

    Raises GigabatchError where there is none.
    """
    checkpoint = agree_on_checkpoint(run, world) if world else latest_checkpoint(run)
    if checkpoint is None:
        raise GigabatchError(f"{run.path}: there is no checkpoint yet; train first.")
    towers = build_towers(run.config(), load_tokenizer(run.tokenizer).get_vocab_size())
    towers.load_state_dict(checkpoint.tensors("towers"), strict=True)
    return checkpoint.step, towers.eval()
