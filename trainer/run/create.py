"""Where runs begin and are found: a folder with a name of its own inside `run.dir`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config
from gigabatch.trainer.run.files import to_json, write_atomically
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.run.provenance import environment


def create_run(
    config: Config, stem: str, taken: Callable[[str], bool] = lambda name: False
) -> RunFolder:
    """Make the folder of a new run, which keeps the config with the name filled in.

    `stem` begins the name where `run.name` is unset; names that are `taken` are passed over.
    Raises GigabatchError where the folder exists; nothing in it is touched.
    """
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
    """A folder that a kill left before anything was in it may be taken."""
    return path.is_dir() and not any(path.iterdir())


def refuse_taken_name(config: Config) -> None:
    """Early, before the data is read, say that `run.name` is taken."""
    path = config.run.dir / (config.run.name or "")
    if config.run.name and path.exists() and not _is_empty(path):
        raise _name_taken(path)


def _name_taken(path: Path) -> GigabatchError:
    if not (path / "config.yaml").exists():
        return GigabatchError(f"run.name: {path} exists and is not a run. Choose another name.")
    if RunFolder(path).is_finished():
        return GigabatchError(
            f"run.name: {path} holds a finished run. Choose another name, or leave it unset."
        )
    return GigabatchError(
        f"run.name: {path} holds an unfinished run. `gigabatch resume {path}` goes on with it; or "
        "choose another name."
    )


def open_run(where: str, home: Path = Path("runs")) -> RunFolder:
    """The run at a path, or by its name inside `home`. Raises GigabatchError."""
    for path in (Path(where), home / where):
        if (path / "config.yaml").exists():
            return RunFolder(path.absolute())
    known = sorted(p.parent.name for p in home.glob("*/config.yaml"))
    hint = f" Runs in {home}: {', '.join(known[-5:])}." if known else ""
    raise GigabatchError(f"{where}: not a run folder (it holds no config.yaml).{hint}")
