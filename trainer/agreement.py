"""What all ranks must agree on before the first step: the data, and the checkpoint to resume."""

from __future__ import annotations

from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints.format import Checkpoint, checkpoint_at, latest_checkpoint
from gigabatch.trainer.distributed import World
from gigabatch.trainer.inputs import TrainData
from gigabatch.trainer.run.folder import RunFolder


def agree_on_data(run: RunFolder, world: World, data: TrainData) -> None:
    """Another order of samples on one rank, or shards changed since the start, would lose samples
    in silence. Raises GigabatchError on every rank."""
    digests = world.gather(data.digest)
    known = world.share(run.data_digest()) or digests[0]
    others = [str(rank) for rank, digest in enumerate(digests) if digest != known]
    if others:
        raise GigabatchError(
            f"{run.path}: rank {', '.join(others)} finds other shards in "
            f"{', '.join(i.source for i in data.indexes)} than the run began with, or the "
            "same in another order. If shards were changed, restore them. If each node keeps "
            "an index of its own (remote or read-only shards), remove those in "
            "$GIGABATCH_CACHE/index, so that all are made alike."
        )


def agree_on_checkpoint(run: RunFolder, world: World) -> Checkpoint | None:
    """The newest sound one: rank 0 verifies, the others read the one it chose. Raises
    GigabatchError on every rank where all are damaged."""
    found: Any = None
    if world.is_main:
        try:
            newest = latest_checkpoint(run)
            found = newest.step if newest else None
        except GigabatchError as error:
            found = str(error)
    found = world.share(found)
    if isinstance(found, str):
        raise GigabatchError(found)
    return None if found is None else checkpoint_at(run, found)
