"""Files that take the place of others whole, and last."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, place: Callable[[Path, Path], object] | None = None) -> Iterator[Path]:
    """A temporary file that, synced, takes the place of `path` at the end, unless there was an
    error."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(fresh, "wb") as held:
        with suppress(OSError):  # a file system without locks: see `remove_left`
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield fresh
            with open(fresh, "rb") as file:
                os.fsync(file.fileno())
            (place or os.replace)(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
    sync_folder(path.parent)


def place_new(path: Path) -> AbstractContextManager[Path]:
    """As `replacing`, but FileExistsError is raised where `path` is there by then."""
    return replacing(path, _link)


def _link(fresh: Path, path: Path) -> None:
    try:
        os.link(fresh, path)  # of two writers one wins
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(fresh, path)


def remove_left(folder: Path, name: str) -> None:
    """Remove the temporary files of `name` (a pattern) whose writers were killed.

    A living writer holds a lock on its file, and the system frees that of a dead one. Where it
    knows no locks, all stay.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def sync_folder(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
