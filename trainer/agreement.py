"""Checks before the first step: all ranks use the same data and resume the same checkpoint."""

from __future__ import annotations

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints.format import Checkpoint, checkpoint_at, latest_checkpoint
from gigabatch.trainer.distributed import World
from gigabatch.trainer.inputs import TrainData
from gigabatch.trainer.run.folder import RunFolder


def agree_on_data(run: RunFolder, world: World, data: TrainData) -> None:
    """Check that every rank has the shards that the run started with.

    Collective: every rank must call it. A different sample order on one rank, or shards that
    changed, would lose samples silently.

    Raises:
        GigabatchError: on every rank, if a fingerprint differs.
    """
    digests = world.gather(data.digest)
    expected = world.broadcast(run.data_digest()) or digests[0]
    others = [str(rank) for rank, digest in enumerate(digests) if digest != expected]
    if others:
        raise GigabatchError(
            f"{run.path}: on rank {', '.join(others)} the shards of "
            f"{', '.join(i.source for i in data.indexes)} differ from those that the run started "
            "with, or are in a different order. If shards were changed, restore them. If nodes "
            "keep separate indexes (of remote or read-only shards), delete them in "
            "$GIGABATCH_CACHE/index on every node; they are rebuilt."
        )


def agree_on_checkpoint(run: RunFolder, world: World) -> Checkpoint | None:
    """Return the newest valid checkpoint, or None before the first.

    Collective: every rank must call it. Rank 0 verifies checksums; the other ranks load the
    checkpoint that it chose.

    Raises:
        GigabatchError: on every rank, if all checkpoints are damaged.
    """
    step: int | None = None
    problem = ""
    if world.is_main:
        try:
            newest = latest_checkpoint(run)
            step = newest.step if newest else None
        except GigabatchError as error:
            problem = str(error)
    step, problem = world.broadcast((step, problem))
    if problem:
        raise GigabatchError(problem)
    return None if step is None else checkpoint_at(run, step)
