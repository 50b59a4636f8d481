"""Fine-tuning: initial weights of a new run's towers from another run's checkpoint.

Only weights are taken: the optimizer, the schedule and the objective start fresh. The checkpoint is
chosen when the run is created and recorded in its config. It is read only while the run has no
checkpoint yet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.checkpoints.format import Checkpoint, latest_checkpoint, open_checkpoint
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import parse_run_config, read_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.ema import stored_weights
from gigabatch.trainer.run.create import open_run
from gigabatch.trainer.towers import Towers

log = logging.getLogger(__name__)
PIXEL_KEYS = ("size", "channels", "mean", "std", "resize", "interpolation")
"""Keys of `data.image` that an image tower notices."""
MAX_NAMES = 5
"""Weight names that an error lists per kind of problem."""


def pin_init_from(config: Config) -> Config:
    """Return the config with `train.init_from` set to the folder of a verified checkpoint.

    If it names a run, the run's newest valid checkpoint is chosen.

    Raises:
        GigabatchError: if there is no such checkpoint, or it is damaged.
    """
    if config.train.init_from is None:
        return config
    try:
        folder = _open(config.train.init_from.expanduser().absolute(), config.run.dir).path
    except GigabatchError as error:
        raise GigabatchError(f"train.init_from: {error}") from error
    pinned = config.train.model_copy(update={"init_from": folder})
    return config.model_copy(update={"train": pinned})


def _open(path: Path, runs: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest checkpoint of a run in a folder or in `runs`."""
    if (path / "manifest.json").exists():
        return open_checkpoint(path)
    run = open_run(str(path) if path.exists() else path.name, runs)
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise GigabatchError(f"{run.path}: there is no checkpoint yet.")
    return checkpoint


def load_init_weights(towers: Towers, config: Config, world: World) -> None:
    """Load the parts of the towers that `train.init_parts` names.

    Collective: every rank must call it.

    Raises:
        GigabatchError: on every rank, if the checkpoint is missing or damaged, lacks the weights
            of `train.init_weights`, or has weights whose names or shapes differ from the towers'.
            Then nothing is loaded.
    """
    folder, parts = config.train.init_from, config.train.init_parts
    assert folder is not None
    problem = ""
    if world.is_main:
        try:
            stored_weights(open_checkpoint(folder), config.train.init_weights)
        except GigabatchError as error:
            problem = f"train.init_from: {error}"
    problem = world.broadcast(problem)
    if problem:
        raise GigabatchError(problem)
    # Rank 0 has verified the checksums; the other ranks skip this, to read the files only once.
    towers.load_state_dict(_stored_parts(towers, folder, config), strict=False)
    log.info("loaded the weights of %s from %s", ", ".join(parts), folder)


def warn_of_other_pixels(config: Config) -> None:
    """Warn if the run of `train.init_from` prepared images for its tower in another way."""
    folder, parts = config.train.init_from, config.train.init_parts
    if folder is None or not any(part.partition(".")[0] == "image" for part in parts):
        return
    path = folder.parent.parent / "config.yaml"
    if not path.exists():
        return  # a copy of the checkpoint alone
    old = parse_run_config(read_config(path), str(path)).data.image.model_dump()
    new = config.data.image.model_dump()
    changed = [f"{k}: {old[k]} there, {new[k]} here" for k in PIXEL_KEYS if old[k] != new[k]]
    if changed:
        log.warning(
            "train.init_from: %s trained its image tower on other pixels (data.image.%s). Set the "
            "keys to its values, unless the change is intended.",
            path.parent, "; data.image.".join(changed),
        )  # fmt: skip


def check_init_weights(towers: Towers, config: Config) -> None:
    """Check that `train.init_from` has the weights that `load_init_weights` needs.

    Raises:
        GigabatchError: if their names or shapes differ from the towers'.
    """
    if config.train.init_from is not None:
        _stored_parts(towers, config.train.init_from, config)


def _stored_parts(towers: Towers, folder: Path, config: Config) -> dict[str, Tensor]:
    """Return the weights of `train.init_parts` in a verified checkpoint that the towers have.

    Raises:
        GigabatchError: if their names or shapes differ from the towers'.
    """
    parts = config.train.init_parts
    stored = _of_parts(stored_weights(Checkpoint(folder, 0, {}), config.train.init_weights), parts)
    wanted = _of_parts(towers.state_dict(), parts)
    # Token heads and second heads (see `further_head`) may be missing in the checkpoint or here.
    extra = {name for name in stored.keys() ^ wanted.keys() if "-" in name.split(".")[1]}
    if fresh := sorted({name.split(".")[1] for name in extra & wanted.keys()}):
        log.info("%s has no head %s: initializing it randomly", folder, ", ".join(fresh))
    stored, wanted = (_without(state, extra) for state in (stored, wanted))
    _check_names_and_shapes(stored, wanted, folder, parts)
    return stored


def _of_parts(tensors: Mapping[str, Tensor], parts: Iterable[str]) -> dict[str, Tensor]:
    """Select the weights of parts such as `image` (encoder and heads) or `text.encoder`."""
    prefixes: list[str] = []
    for part in parts:
        modality, _, only_encoder = part.partition(".")
        heads = [] if only_encoder else [f"heads.{modality}.", f"heads.{modality}-"]
        prefixes += [f"encoders.{modality}.", *heads]
    return {name: t for name, t in tensors.items() if name.startswith(tuple(prefixes))}


def _without(tensors: Mapping[str, Tensor], names: Set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _check_names_and_shapes(
    stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], folder: Path, parts: Iterable[str]
) -> None:
    """Raise if the stored weights and the towers' weights differ in names or shapes."""
    common = [name for name in wanted if name in stored]
    misfits = {
        "missing in the checkpoint": [name for name in wanted if name not in stored],
        "unknown to this run": [name for name in stored if name not in wanted],
        "of a different shape": [
            f"{name} ({list(stored[name].shape)} in the checkpoint, {list(wanted[name].shape)} "
            "in this run)"
            for name in common
            if stored[name].shape != wanted[name].shape
        ],
    }
    problems = [_listed(kind, names) for kind, names in misfits.items() if names]
    if problems:
        raise GigabatchError(
            f"train.init_from: the weights of {folder} do not fit the towers "
            f"({', '.join(parts)}): {'; '.join(problems)}. Set `towers` and `data` as in that "
            "run, or name fewer train.init_parts."
        )


def _listed(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} {kind}: {', '.join(names[:MAX_NAMES])}{more}"
