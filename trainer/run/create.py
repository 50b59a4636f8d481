"""Creation and opening of runs: folders with unique names inside `run.dir`."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config
from gigabatch.trainer.run.files import to_json, write_atomically
from gigabatch.trainer.run.find import HOME, find_run
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.run.provenance import environment

log = logging.getLogger(__name__)


def create_run(
    config: Config, stem: str, taken: Callable[[str], bool] = lambda name: False
) -> RunFolder:
    """Create the folder of a new run, with its config and environment.

    Args:
        config: The run; an unset `run.name` is filled in.
        stem: Prefix of the name if `run.name` is unset.
        taken: Returns whether a name is in use elsewhere; such names are skipped.

    Raises:
        GigabatchError: if the folder exists and is not empty (nothing in it is changed), or
            cannot be written.
    """
    if config.train.epochs is not None:
        raise ValueError("call resolve_epochs first: a run keeps its length in steps")
    home = config.run.dir
    try:
        home.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", stem) or "run"
        path = _take_name(home, config.run.name, stem, taken)
    except OSError as error:
        raise GigabatchError(f"run.dir: {home} cannot be written: {error.strerror}.") from error
    named = config.run.model_copy(update={"name": path.name})
    run = RunFolder(path)
    run.write_config(config.model_copy(update={"run": named}))
    write_atomically(run.environment, to_json(environment()))
    return run


def _take_name(home: Path, name: str | None, stem: str, taken: Callable[[str], bool]) -> Path:
    """Create the run's folder and return it."""
    if name is None:
        for number in itertools.count(1):
            path = home / f"{stem}-{number:03d}"
            if not taken(path.name):
                with suppress(FileExistsError):
                    path.mkdir()
                    return path
    path = home / str(name)
    try:
        path.mkdir()
    except FileExistsError:
        if not _is_empty(path):
            raise _name_taken(path) from None
    return path


def _is_empty(path: Path) -> bool:
    """Return whether a folder is empty, as after a kill; it can then be used for a run."""
    return path.is_dir() and not any(path.iterdir())


def resolve_epochs(config: Config, samples: int) -> Config:
    """Return the config with `train.epochs` converted to `train.steps`.

    Args:
        config: The config of a new run. Returned unchanged if it has no `train.epochs`.
        samples: Total number of samples of all training sources, which is one epoch.
    """
    epochs = config.train.epochs
    if epochs is None:
        return config
    # Exact decimals: in floating point 0.07 * 100 is above 7 and would round up to 8.
    exact = Fraction(str(epochs)) * samples / config.batch.global_size
    steps = max(1, math.ceil(exact))
    log.info(
        "train.epochs=%g: %s steps of %s samples; an epoch is %s samples",
        epochs, f"{steps:,}", f"{config.batch.global_size:,}", f"{samples:,}",
    )  # fmt: skip
    train = config.train.model_copy(update={"steps": steps, "epochs": None})
    return config.model_copy(update={"train": train})


def check_name_is_free(config: Config) -> None:
    """Check that `run.name` is not in use. Call it before the data is read.

    Raises:
        GigabatchError: if the name is in use.
    """
    path = config.run.dir / (config.run.name or "")
    if config.run.name and path.exists() and not _is_empty(path):
        raise _name_taken(path)


def _name_taken(path: Path) -> GigabatchError:
    if not (path / "config.yaml").exists():
        return GigabatchError(f"run.name: {path} exists and is not a run. Set a different name.")
    if RunFolder(path).is_finished():
        return GigabatchError(
            f"run.name: {path} contains a finished run. Set a different name, or leave it unset."
        )
    return GigabatchError(
        f"run.name: {path} contains an unfinished run. Resume it with `gigabatch resume {path}`, "
        "or set a different name."
    )


def open_run(where: str, home: Path = HOME) -> RunFolder:
    """Open the run at a path, or the run of this name in `home`.

    Raises:
        GigabatchError: if there is neither; the message names the runs that exist.
    """
    return RunFolder(find_run(where, home))
