"""Fine-tuning: a new run's towers begin from the weights of another run's checkpoint.

Weights alone: the optimizer, the schedule and the objective begin anew. The checkpoint is pinned
when the run is made, so that it stands in the run's config, and is read only while the run has no
checkpoint of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints.format import Checkpoint, latest_checkpoint, open_checkpoint
from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.ema import stored_weights
from gigabatch.trainer.run.create import open_run
from gigabatch.trainer.towers import Towers

log = logging.getLogger(__name__)
SHOWN = 5  # names that an error lists of each kind


def pin_initial(config: Config) -> Config:
    """The config with `train.init_from` made the folder of one sound checkpoint: of a run, its
    newest. Raises GigabatchError where there is none."""
    if config.train.init_from is None:
        return config
    try:
        folder = _find(config.train.init_from.expanduser().absolute(), config.run.dir).path
    except GigabatchError as error:
        raise GigabatchError(f"train.init_from: {error}") from error
    pinned = config.train.model_copy(update={"init_from": folder})
    return config.model_copy(update={"train": pinned})


def _find(path: Path, home: Path) -> Checkpoint:
    if (path / "manifest.json").exists():
        return open_checkpoint(path)
    run = open_run(str(path) if path.exists() else path.name, home)
    found = latest_checkpoint(run)
    if found is None:
        raise GigabatchError(f"{run.path}: there is no checkpoint yet.")
    return found


def load_initial(towers: Towers, config: Config, world: World) -> None:
    """Load the parts of `towers` that `train.init_parts` names; a collective.

    Raises GigabatchError, on every rank, where the checkpoint is damaged or gone, has no weights of
    the kind asked for, or its names or shapes are not those of the towers; then nothing is loaded.
    """
    folder, parts = config.train.init_from, config.train.init_parts
    assert folder is not None
    fault = ""
    if world.is_main:
        try:
            stored_weights(open_checkpoint(folder), config.train.init_weights)
        except GigabatchError as error:
            fault = f"train.init_from: {error}"
    fault = world.share(fault)
    if fault:
        raise GigabatchError(fault)
    given = _of_parts(stored_weights(Checkpoint(folder, 0, {}), config.train.init_weights), parts)
    wanted = _of_parts(towers.state_dict(), parts)
    further = {name for name in given.keys() ^ wanted.keys() if "-" in name.split(".")[1]}
    if fresh := sorted({name.split(".")[1] for name in further & wanted.keys()}):
        log.info("%s has no head %s: it starts anew", folder, ", ".join(fresh))
    given, wanted = (_without(state, further) for state in (given, wanted))
    _refuse_other(given, wanted, folder, parts)
    towers.load_state_dict(given, strict=False)
    log.info("weights of %s taken from %s", ", ".join(parts), folder)


def _of_parts(tensors: Mapping[str, Tensor], parts: Iterable[str]) -> dict[str, Tensor]:
    """Of a state of towers, the weights of `image`, `text`, `image.encoder` or `text.encoder`."""
    starts: list[str] = []
    for part in parts:
        modality, _, only_encoder = part.partition(".")
        heads = [] if only_encoder else [f"heads.{modality}.", f"heads.{modality}-"]
        starts += [f"encoders.{modality}.", *heads]
    return {name: t for name, t in tensors.items() if name.startswith(tuple(starts))}


def _without(tensors: Mapping[str, Tensor], names: Set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _refuse_other(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], folder: Path, parts: Iterable[str]
) -> None:
    both = [name for name in wanted if name in given]
    faults = {
        "missing there": [name for name in wanted if name not in given],
        "unknown here": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} ({list(given[name].shape)} there, {list(wanted[name].shape)} here)"
            for name in both
            if given[name].shape != wanted[name].shape
        ],
    }
    told = [_told(kind, names) for kind, names in faults.items() if names]
    if told:
        raise GigabatchError(
            f"train.init_from: {folder} does not fit the towers ({', '.join(parts)}): "
            f"{'; '.join(told)}. Set `towers` and `data` as that run has them, or take fewer "
            "train.init_parts."
        )


def _told(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}"
