"""Search for a run folder by its path or its name. Imports nothing heavy."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from gigabatch.data.errors import GigabatchError

HOME = Path("runs")
"""Folder in which a run is searched by its name; the default of `run.dir`."""


def find_run(where: str, home: Path = HOME) -> Path:
    """Return the absolute path of the run folder at a path, or of the run of this name in `home`.

    Raises:
        GigabatchError: if neither contains a config.yaml; the message names the runs that exist.
    """
    for path in (Path(where), home / where):
        if os.path.exists(path / "config.yaml"):
            return path.absolute()
    known = sorted(path.parent.name for path in home.glob("*/config.yaml"))
    nearest = difflib.get_close_matches(Path(where).name, known, 1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    hint += f" Runs in {home}: {', '.join(known[-5:])}." if known else ""
    where = where if len(where) <= 200 else f"{where[:200]}..."
    raise GigabatchError(f"{where}: not a run folder (it contains no config.yaml).{hint}")
